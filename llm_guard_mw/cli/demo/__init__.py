"""The demo: a stand-in provider, an app in front of it, and users who spend until budgets bite.

crowd     who calls what, and how often: made up from a seed
stage     the stand-in and the example app, as servers on free ports of this machine
outcome   what came of it: the answers, our books, and the provider's own list beside them
show      the same, for people to read
"""
