"""What a run will take, before it is submitted: parameters, memory, operations, time and energy.

Nothing here trains. A model of the run file's form is made without data, counted, and traced; the rest is arithmetic,
of which every assumption is stated. `hpclr plan` prints it.
"""
