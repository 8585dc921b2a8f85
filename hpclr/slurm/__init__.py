"""Everything that spells Slurm's words."""
