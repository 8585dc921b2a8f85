"""A run: from a run file to trained weights, resumable to the bit. Where all other rooms meet."""
