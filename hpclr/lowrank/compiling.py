"""What torch.compile needs to know of models whose ranks change."""


def expect_rank_changes(compilations: int = 64) -> None:
    """Has torch.compile keep the compiled code when ranks change; for the whole process.

    torch takes the shapes of parameters for fixed, compiles anew for each new rank, and gives up after eight times.
    After this call the rank of a layer becomes a variable of the compiled code once it has changed for the first time.

    Args:
        compilations: how many a piece of code is allowed before torch gives up on it: one for each check at which
            layers are converted, change their rank for the first time or begin to multiply through their factors.
    """
    from torch._dynamo import config  # takes a second, which only those who compile should wait

    config.force_parameter_static_shapes = False
    config.recompile_limit = max(config.recompile_limit, compilations)
