"""Models of Hugging Face's transformers, from a configuration and with random weights: nothing is downloaded.

The package is imported when such a model is built, which the extra `zoo` of hpclr installs.
"""

from typing import Any

from torch import Tensor, nn

from hpclr.models.common import check_dropout, check_whole


class PatchTST(nn.Module):
    """A transformer over patches of a time series, each column by itself (Nie et al., arXiv 2211.14730).

    As in the paper all columns share the weights, each window is brought to mean 0 and standard deviation 1 and its
    forecast brought back (so that outputs are in the units of the inputs), and a linear head sees all patches.

    Args:
        sample_shape: (rows, columns) of the window that it sees.
        horizon: rows to predict.
        columns: as in `sample_shape`.
        patch: rows in a patch.
        patch_stride: rows from the beginning of a patch to that of the next, at most `patch`; if less, they overlap.
        dim: width of a token; must be a multiple of `heads`.
        depth: number of blocks.
        heads: attention heads of a block.
        ffn: hidden width of a block's MLP.
        norm: batch, over all patches of a batch as in the paper, or layer, which sees one patch at a time.
        dropout: probability in the attention, in the MLP, after the positions and before the head.

    Raises:
        ValueError: an option is out of its range or does not fit the samples, or transformers is not installed.
    """

    def __init__(
        self,
        sample_shape: tuple[int, ...],
        horizon: int,
        columns: int,
        *,
        patch: int = 16,
        patch_stride: int = 8,
        dim: int = 64,
        depth: int = 3,
        heads: int = 4,
        ffn: int = 128,
        norm: str = "batch",
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        sizes = {"patch": patch, "patch_stride": patch_stride, "dim": dim, "depth": depth, "heads": heads, "ffn": ffn}
        check_whole("patchtst", horizon=horizon, columns=columns, **sizes)
        check_dropout("patchtst", dropout)
        _check_heads("patchtst", dim, heads)
        _check_patches(patch, patch_stride, sample_shape[0], norm)
        transformers = _transformers("patchtst")
        config = transformers.PatchTSTConfig(
            num_input_channels=columns,
            context_length=sample_shape[0],
            prediction_length=horizon,
            patch_length=patch,
            patch_stride=patch_stride,
            d_model=dim,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            ffn_dim=ffn,
            norm_type=f"{norm}norm",
            attention_dropout=dropout,
            positional_dropout=dropout,
            ff_dropout=dropout,
            head_dropout=dropout,
            pooling_type=None,
            scaling="std",
            do_mask_input=False,
        )
        self.net = transformers.PatchTSTForPrediction(config)

    def forward(self, x: Tensor) -> Tensor:
        """Return a forecast (batch, horizon, columns) for windows (batch, rows, columns), in their units."""
        forecast: Tensor = self.net(past_values=x).prediction_outputs
        return forecast


class GPT2(nn.Module):
    """GPT-2 (Radford et al., 2019), which predicts the next token at every place of a window.

    The head shares the weight of the embedding, as in the original: they become low-rank together, if asked to.

    Args:
        sample_shape: (tokens,) of the window that it sees.
        context: as in `sample_shape`.
        vocabulary: number of different tokens.
        dim: width of a token; must be a multiple of `heads`.
        depth: number of blocks.
        heads: attention heads of a block.
        dropout: probability after the embedding, in the attention and after both parts of a block.

    Raises:
        ValueError: an option is out of its range, or transformers is not installed.
    """

    def __init__(
        self,
        sample_shape: tuple[int, ...],
        context: int,
        vocabulary: int,
        *,
        dim: int = 128,
        depth: int = 4,
        heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_whole("gpt2", context=context, vocabulary=vocabulary, dim=dim, depth=depth, heads=heads)
        check_dropout("gpt2", dropout)
        _check_heads("gpt2", dim, heads)
        transformers = _transformers("gpt2")
        config = transformers.GPT2Config(
            vocab_size=vocabulary,
            n_positions=context,
            n_embd=dim,
            n_layer=depth,
            n_head=heads,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            resid_pdrop=dropout,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.net = transformers.GPT2LMHeadModel(config)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (batch, context, vocabulary) for tokens (batch, context), each of those up to its place."""
        # without a cache transformers looks for packed sequences in every pass, and waits for a GPU to tell
        logits: Tensor = self.net(input_ids=x, use_cache=True).logits
        return logits


def _check_patches(patch: int, stride: int, rows: int, norm: str) -> None:
    if patch >= rows:
        raise ValueError(f"patchtst: patch must be less than the {rows} rows of data.context, found {patch}.")
    if stride > patch:  # rows between patches would not be seen
        raise ValueError(f"patchtst: patch_stride must be at most patch, {patch}, found {stride}.")
    if norm not in ("batch", "layer"):
        raise ValueError(f"patchtst: norm must be one of batch, layer, found {norm!r}.")


def _check_heads(model: str, dim: int, heads: int) -> None:
    if dim % heads:
        raise ValueError(f"{model}: dim must be a multiple of heads, found dim {dim} and heads {heads}.")


def _transformers(model: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"{model} needs the package transformers, which cannot be imported here ({error}): pip install 'hpclr[zoo]'"
        ) from error
    return transformers
