"""What each command does with its arguments: a module a command, whose `run` planner.cli calls."""
