"""The demo: a stand-in provider, an app in front of it, and users who spend until budgets bite."""
