"""Tasks: questions, how a model scores on them, and paired intervals."""
