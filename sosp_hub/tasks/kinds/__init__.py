"""One file a task, named by the hub's pipeline tag; none of them loads torch when imported."""
