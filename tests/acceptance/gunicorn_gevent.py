"""What an app on gevent needs that is loaded before the fork: patched before anything else is imported."""

from gevent import monkey

monkey.patch_all()
