"""What the processes of an attempt leave in its directory, the watch over them, and who is to blame when one fails."""
