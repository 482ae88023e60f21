"""The shape of a GPT: everything that its parameter count and its FLOPs follow from."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from nanofed.errors import ConfigError

WIDTH_PER_LAYER = 64
HEAD_WIDTH = 128
MOST_LAYERS = 1000  # a file that names more is damaged: the deepest models have some hundred
ROTARY_REACH = 10  # the tables hold this many training rows: generation may run past sequence_len


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT; the defaults are d20.

    Attributes:
        sequence_len: Tokens in a training row; the rotary tables reach ten times as far.
        vocab_size: Rows of the embedding and of the head.
        n_layer: Transformer blocks.
        n_head: Query heads.
        n_kv_head: Key and value heads; fewer than `n_head` is grouped-query attention.
        n_embd: Width of the residual stream.

    Raises:
        ConfigError: a size is not a positive integer, there are too many layers, or heads do not divide.

    Example:
        >>> config = nanofed.GPTConfig.from_depth(20)
        >>> config.n_layer, config.n_head, config.n_embd, config.num_parameters
        (20, 10, 1280, 560988160)
    """

    sequence_len: int = 2048
    vocab_size: int = 65_536
    n_layer: int = 20
    n_head: int = 10
    n_kv_head: int = 10
    n_embd: int = 1280

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if type(value) is not int or value < 1:
                raise ConfigError(f"model: {name} must be a positive integer, not {value!r}")
        if self.n_layer > MOST_LAYERS:
            raise ConfigError(f"model: n_layer is {self.n_layer:,}, of {MOST_LAYERS:,} at most")
        if self.n_embd % self.n_head or (self.n_embd // self.n_head) % 2:
            raise ConfigError(
                f"model: n_embd {self.n_embd} does not split into {self.n_head} heads of even width; change n_head"
            )
        if self.n_head % self.n_kv_head:
            raise ConfigError(f"model: n_kv_head {self.n_kv_head} must divide n_head {self.n_head}")

    @classmethod
    def from_depth(cls, depth: int, *, vocab_size: int = 65_536, sequence_len: int = 2048) -> GPTConfig:
        """Derive every size from the depth: 64 of width a layer, heads of 128 (karpathy/nanochat, base_train).

        Raises:
            ConfigError: the depth does not split into equal heads (5, 9, 11, …; even ones always do).
        """
        if type(depth) is not int or depth < 1:
            raise ConfigError(f"model: depth must be a positive integer, not {depth!r}")
        width = WIDTH_PER_LAYER * depth
        n_head = max(1, -(-width // HEAD_WIDTH))
        if width % n_head:
            raise ConfigError(
                f"model: depth {depth} gives a width of {width}, not {n_head} equal heads; take an even depth"
            )
        return cls(
            sequence_len=sequence_len,
            vocab_size=vocab_size,
            n_layer=depth,
            n_head=n_head,
            n_kv_head=n_head,
            n_embd=width,
        )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def max_positions(self) -> int:
        """Positions that the rotary tables hold: the longest sequence the model can read."""
        return ROTARY_REACH * self.sequence_len

    @property
    def num_embedding_parameters(self) -> int:
        """Parameters of the token embedding, which are looked up and not multiplied."""
        return self.vocab_size * self.n_embd

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model, embedding and head included."""
        attention = 2 * self.n_embd * (self.n_head + self.n_kv_head) * self.head_dim
        mlp = 8 * self.n_embd**2
        return 2 * self.num_embedding_parameters + self.n_layer * (attention + mlp)

    def flops_per_token(self) -> int:
        """Return the FLOPs of forward and backward a token: 6 N without the embedding, and attention's 12 L H Q T.

        The formula of PaLM's appendix B (arXiv:2204.02311), which nanochat reports its MFU with: attention is counted
        over the whole square, not over the causal half.
        """
        attention = 12 * self.n_layer * self.n_head * self.head_dim * self.sequence_len
        return 6 * (self.num_parameters - self.num_embedding_parameters) + attention
