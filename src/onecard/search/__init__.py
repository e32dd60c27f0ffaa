"""The search: which recipes to try, a process for each, and the choice among what passed."""
