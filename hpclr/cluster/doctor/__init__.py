"""`hpclr doctor`: what a run needs of a machine, tried out, and what to do where something is wrong."""
