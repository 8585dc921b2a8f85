"""Methods side by side: the same run file with each of them, over several seeds, and what each is worth."""
