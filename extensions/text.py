"""Text as condition: a word-level tokenizer and a small transformer encoder.

The condition embedder tau(y) of text-to-image latent diffusion (Rombach et al. 2022, section 3.3) as
*Differentially Private Latent Diffusion Models* (Liu et al. 2024, text-to-image experiment) tunes it with the
attention. Theirs is large and reads BERT's pieces of words. Here a token is a whole word, and the transformer
is small and trained from scratch on public captions. Captions come from extensions/captions.py or from the
data set.

    caption -> Tokenizer.encode -> tokens (N, L) -> TextEncoder -> context (N, L, D), mask (N, L)
                                                                        -> unet.Attention

Privacy. The list of words (`vocabulary`) is published with the model, so it is made from the grammar, the
schema (names of attributes and classes) and the captions of the public set, never from private captions: a
rare word there, a person's name say, would stand in the release in the clear. Words that are not in the list
become <unk>; how many do so is private, so what is said of them before the private stage is fixed (`NOTE`).

Symbols: N prompts · L tokens of a prompt, padded · D width of the context · V words and special tokens.
"""
import math
import re
from collections import Counter

import torch
import torch.nn.functional as F
from torch import nn

import unet
from extensions.captions import FRAMES, GLUE, NOUNS, PHRASES

PAD, BEGIN, UNKNOWN = 0, 1, 2  # every prompt starts with BEGIN: even the empty one has a token to attend to
SPECIAL = 3
MOST_WORDS = 20_000  # of public captions, the most frequent: each costs a row of the embedding
NOTE = ("note: words of private captions that are neither in the grammar nor in the names of classes and "
        "attributes nor in the public captions are read as <unk>; public captions that use them teach them")


def split(prompt):
    """Prompt -> words: lower case, apart at everything that is neither letter nor digit."""
    return re.findall(r"[^\W_]+", prompt.lower())


def vocabulary(attribute_names, class_names, public_captions=()):
    """Sorted list of all words that the grammar can say about these attributes and classes, and public ones.

    Made from names (the schema, treated as public) and captions of the PUBLIC set, never from private
    captions or images. All words of the face grammar are in it whatever the names, so that a public model can
    be tuned on faces later.
    """
    said = Counter(word for caption in public_captions or () for word in split(caption))
    often = sorted(said, key=lambda word: (-said[word], word))[:MOST_WORDS]
    options = [*NOUNS.values(), *(phrases for _, phrases in PHRASES.values())]
    grammar = [GLUE, *FRAMES, *(phrase for phrases in options for phrase in phrases)]
    names = [*grammar, *attribute_names, *class_names]
    return sorted({word for part in names for word in split(part)}.union(often))


# ---------------------------------------------------------------------------------------------- the tokenizer


class Tokenizer:
    """Words to numbers: 0 padding, 1 begin, 2 unknown, then the given words. `length` is L, begin included.

    Raises ValueError for a word that `split` would not give, a word twice, or a length below 1.
    """

    def __init__(self, words, length):
        if length < 1 or len(set(words)) != len(words) or any(split(word) != [word] for word in words):
            raise ValueError("a tokenizer needs a length of at least 1 and distinct words in lower case, as "
                             "text.vocabulary gives them")
        self.words, self.length = list(words), length
        self.index = {word: SPECIAL + i for i, word in enumerate(words)}

    def __len__(self):
        """V, the number of different tokens."""
        return SPECIAL + len(self.words)

    def encode(self, prompts):
        """List of N str -> tokens (N, L) int64: begin, words, padding. Words beyond L are cut off."""
        tokens = torch.full((len(prompts), self.length), PAD)
        for row, prompt in zip(tokens, prompts, strict=True):
            numbers = [BEGIN] + [self.index.get(word, UNKNOWN) for word in split(prompt)]
            row[:len(numbers)] = torch.tensor(numbers[:self.length])
        return tokens

    def unknown(self, prompt):
        """The words of a prompt that are not in the vocabulary, each once, in order."""
        return [word for word in dict.fromkeys(split(prompt)) if word not in self.index]


# ------------------------------------------------------------------------------------------------ the encoder


class TextEncoder(nn.Module):
    """Tokens (N, L) -> context (N, L, dim): word embedding plus sinusoidal position, then transformer blocks.

    Made of Linear, LayerNorm and Embedding layers, for which extensions/bookkeeping.py has a rule, and
    without dropout. Padding is masked inside, and by `mask` wherever the context is attended to, so that a
    longer padding changes nothing. With null_class the empty prompt means "no condition" (classifier-free
    guidance).
    """

    def __init__(self, vocabulary_size, dim, length, width=64, layers=2, heads=4, null_class=True):
        super().__init__()
        if width % (2 * heads):
            raise ValueError(f"the text encoder's width {width} must be even and divisible by its {heads} "
                             "heads")
        self.length, self.null_class = length, null_class
        self.embedding = nn.Embedding(vocabulary_size, width)
        frequencies = torch.exp(-math.log(10000) * torch.arange(0, width, 2) / width)
        angles = torch.arange(length)[:, None] * frequencies  # (length, width / 2)
        positions = torch.cat([angles.sin(), angles.cos()], 1)  # (length, width)
        self.register_buffer("positions", positions, persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, dim)

    def forward(self, tokens):
        if tokens.shape[1] > self.length:
            raise ValueError(f"prompts of {tokens.shape[1]} tokens, but this encoder knows {self.length} "
                             "positions")
        x = self.embedding(tokens) + self.positions[:tokens.shape[1]]  # (N, L, width)
        mask = self.mask(tokens)[:, None, None]  # (N, 1, 1, L): the same for all heads and tokens
        for block in self.blocks:
            x = block(x, mask)
        return self.out(self.norm(x))

    def mask(self, tokens):
        """(N, L) bool: True where there is a token. Never all False: every prompt has its begin."""
        return tokens != PAD

    def null(self, tokens):
        """Empty prompts in the shape of tokens. ValueError if the model has never seen dropped conditions."""
        if not self.null_class:
            raise ValueError("this model has not seen empty prompts, so guidance other than 1 and condition "
                             "dropping are not possible; train with --cond-drop above 0 or use guidance 1")
        empty = torch.full_like(tokens, PAD)
        empty[:, 0] = BEGIN
        return empty


class Block(nn.Module):
    """Self-attention and a feed-forward net, behind LayerNorms, around residuals (Vaswani et al. 2017)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x, mask):
        """x (N, L, width), mask (N, 1, 1, L) -> (N, L, width)."""
        q, k, v = (unet.split_heads(y, self.heads) for y in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        x = x + self.out(unet.attend(q, k, v, mask).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))
