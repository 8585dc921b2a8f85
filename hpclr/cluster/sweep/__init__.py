"""Many runs that differ in a few keys: told apart, trained here or as one job array, and compared."""
