"""How the processes of a job find out who they are, find one another, and prove that they belong together."""
