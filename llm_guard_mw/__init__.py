"""The spend guard in front of AI routes: quotas and budgets held before, exact usage settled after."""
