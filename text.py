"""Text as condition: a caption grammar over attributes, a word-level tokenizer, a small transformer encoder.

The condition embedder tau(y) of text-to-image latent diffusion (Rombach et al. 2022, section 3.3) as *Differentially
Private Latent Diffusion Models* (Liu et al. 2024, text-to-image experiment: CelebA-HQ with captions made from its 40
attributes) uses it: a transformer over word tokens, trained from scratch on public captions and tuned privately with the
attention. The file stands alone: it imports nothing of the project. Run it alone: `python text.py` prints captions.

    {"Male": False, "Smiling": True, ...} -> caption -> "a smiling young woman with black hair and eyeglasses"
        -> Tokenizer.encode -> tokens (N, L) -> TextEncoder -> context (N, L, D) + mask (N, L) -> unet.Attention

Privacy. The list of words (`vocabulary`) is published with the model, so it is made from the grammar and the schema (names of
attributes and classes) and never from private captions: a rare word there, a person's name say, would stand in the
release in the clear. Words that are not in the list become <unk>.

Symbols: N prompts · L tokens of a prompt, padded · D width of the context · V words and special tokens.
"""
import math
import re

import torch
import torch.nn.functional as F
from torch import nn

PAD, BEGIN, UNKNOWN = 0, 1, 2  # every prompt starts with BEGIN: even the empty one has a token to attend to
SPECIAL = 3

# -------------------------------------------------------------------------------------------------------- the grammar

# What a true attribute may be called, by its place in the sentence. Names are CelebA's 40 (Liu et al. 2015) and three of
# other face sets; an attribute that is not listed is called by its name.
ADJECTIVES = {
    "Attractive": ("attractive", "good-looking"), "Bald": ("bald",), "Chubby": ("chubby", "plump"),
    "Senior": ("elderly", "old"), "Smiling": ("smiling", "cheerful"), "Young": ("young", "youthful"),
}
PICTURES = {"Blurry": ("blurry", "blurred", "out-of-focus"), "Grayscale": ("grayscale", "black-and-white")}
TEXTURES = {"Straight_Hair": ("straight",), "Wavy_Hair": ("wavy",)}
COLOURS = {"Black_Hair": ("black",), "Blond_Hair": ("blond", "blonde"), "Brown_Hair": ("brown",), "Gray_Hair": ("gray", "grey")}
FEATURES = {
    "5_o_Clock_Shadow": ("a five o'clock shadow", "stubble"), "Arched_Eyebrows": ("arched eyebrows", "curved eyebrows"),
    "Bags_Under_Eyes": ("bags under the eyes",), "Bangs": ("bangs", "a fringe"), "Big_Lips": ("big lips", "full lips"),
    "Big_Nose": ("a big nose", "a large nose"), "Bushy_Eyebrows": ("bushy eyebrows", "thick eyebrows"),
    "Double_Chin": ("a double chin",), "Goatee": ("a goatee", "a goatee beard"), "High_Cheekbones": ("high cheekbones",),
    "Mouth_Slightly_Open": ("a slightly open mouth", "parted lips"), "Mustache": ("a mustache", "a moustache"),
    "Narrow_Eyes": ("narrow eyes",), "No_Beard": ("no beard", "a clean-shaven face"), "Oval_Face": ("an oval face",),
    "Pale_Skin": ("pale skin", "a pale complexion"), "Pointy_Nose": ("a pointy nose", "a pointed nose"),
    "Receding_Hairline": ("a receding hairline",), "Rosy_Cheeks": ("rosy cheeks", "red cheeks"), "Sideburns": ("sideburns",),
}
WORN = {
    "Eyeglasses": ("eyeglasses", "glasses"), "Heavy_Makeup": ("heavy makeup", "a lot of makeup"),
    "Wearing_Earrings": ("earrings",), "Wearing_Hat": ("a hat",), "Wearing_Lipstick": ("lipstick",),
    "Wearing_Necklace": ("a necklace",), "Wearing_Necktie": ("a necktie", "a tie"),
}
SLOTS = (ADJECTIVES, PICTURES, TEXTURES, COLOURS, FEATURES, WORN)
PHRASES = {(name, True): (slot, phrases) for slot, table in enumerate(SLOTS) for name, phrases in table.items()}
PHRASES |= {("Young", False): (0, ("older", "middle-aged")), ("No_Beard", False): (4, ("a beard", "facial hair"))}
NOUNS = {  # (Child, Male), None where the set does not say
    (True, True): ("boy",), (True, False): ("girl",), (True, None): ("child", "kid"), (False, None): ("adult",),
    (False, True): ("man", "guy"), (False, False): ("woman", "lady"), (None, None): ("person",),
    (None, True): ("man", "guy"), (None, False): ("woman", "lady"),
}
FRAMES = ("", "a photo of ", "a picture of ", "a portrait of ", "an image of ")
GLUE = "a an the and of with without wearing not hair photo picture letter digit"


def caption(attributes, generator, omit=0.2, deny=0.02):
    """One English sentence about one picture: {attribute name: bool} -> str, e.g. "a bald man wearing glasses".

    Wording and order are random, drawn from `generator` (CPU). omit: probability that a true attribute goes unsaid;
    deny: that a false one is said ("without a hat"). "Male" and "Child" choose the noun and are always said. An attribute
    that the grammar does not know is said by its name ("Dark_Photo": ", dark photo").
    """
    random = dice(generator)

    def chance(p):
        return next(random) < p

    def pick(options):
        return options[int(next(random) * len(options))]

    def shuffled(items):
        return sorted(items, key=lambda _: next(random))

    attributes = {name: bool(value) for name, value in attributes.items()}
    said, rest = [[] for _ in SLOTS], []
    for name, value in attributes.items():
        if name in ("Male", "Child") or needless(name, attributes):
            continue
        if value or (name, value) in PHRASES:
            slot, phrases = PHRASES.get((name, value), (None, (name.replace("_", " ").lower(),)))
            if not chance(omit):
                (rest if slot is None else said[slot]).append(pick(phrases))
        elif chance(deny):
            slot, phrases = PHRASES.get((name, True), (None, (name.replace("_", " ").lower(),)))
            hair = " hair" if name in TEXTURES or name in COLOURS else ""
            rest.append(("without " if hair or name in FEATURES or name in WORN else "not ") + pick(phrases) + hair)
    adjectives, pictures, textures, colours, features, worn = map(shuffled, said)
    if not any(name in ("Male", "Child") or (name, True) in PHRASES for name in attributes):
        return ", ".join(["a picture", *rest])  # attributes of something else than faces
    subject = " ".join([*adjectives, pick(NOUNS[attributes.get("Child"), attributes.get("Male")])])
    frame = f"{article(' '.join(pictures))} {pick(('photo', 'picture'))} of " if pictures else pick(FRAMES)
    if textures or colours:
        features = shuffled([*features, " ".join(filter(None, [*textures, listed(colours), "hair"]))])
    if chance(0.3):  # "with a hat" as well as "wearing a hat"
        features, worn = shuffled([*features, *worn]), []
    clauses = [f"{word} {listed(items)}" for word, items in (("with", features), ("wearing", worn)) if items]
    return ", ".join([" ".join([frame + article(subject), *shuffled(clauses)]), *shuffled(rest)])


def dice(generator):
    """Endless random numbers in [0, 1), drawn in blocks: one by one they would take most of the time."""
    while True:
        yield from torch.rand(32, generator=generator).tolist()


def needless(name, attributes):
    """Whether another attribute already says it: a child is not "older", a beard is no subject in women."""
    return (name == "Young" and bool(attributes.get("Child") or attributes.get("Senior"))) or (
        name == "No_Beard" and attributes.get("Male") is False)


def article(phrase):
    return ("an " if phrase[:1].lower() in tuple("aeiou") else "a ") + phrase


def listed(items):
    """["a", "b", "c"] -> "a, b and c"."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def class_caption(class_name, generator):
    """One sentence about a picture of a class: "frog" -> "a photo of a frog", "7" -> "a picture of the digit 7"."""
    name, frame = class_name.replace("_", " ").lower(), FRAMES[int(torch.randint(len(FRAMES), (), generator=generator))]
    if len(name) == 1 and name.isalnum():  # "a photo of an a" would be hard to tell from its article
        return f"{frame}the {'digit' if name.isdigit() else 'letter'} {name}"
    return frame + article(name)


def split(prompt):
    """Prompt -> words: lower case, apart at everything that is neither letter nor digit."""
    return re.findall(r"[^\W_]+", prompt.lower())


def vocabulary(attribute_names, class_names):
    """Sorted list of all words that the grammar can say about these attributes and classes.

    Made from names only (the schema, treated as public), never from captions or pictures. All words of the face
    grammar are in it whatever the names, so that a public model can be tuned on faces later.
    """
    phrases = [phrase for options in [*NOUNS.values(), *(p for _, p in PHRASES.values())] for phrase in options]
    return sorted({word for part in [GLUE, *FRAMES, *phrases, *attribute_names, *class_names] for word in split(part)})


# ------------------------------------------------------------------------------------------------------ the tokenizer


class Tokenizer:
    """Words to numbers: 0 padding, 1 begin, 2 unknown, then the given words. `length` is L, tokens of a prompt with begin.

    Raises ValueError for a word that `split` would not give, a word twice, or a length below 1.
    """

    def __init__(self, words, length):
        if length < 1 or len(set(words)) != len(words) or any(split(word) != [word] for word in words):
            raise ValueError("a tokenizer needs a length of at least 1 and distinct words in lower case, as text.vocabulary "
                             "gives them")
        self.words, self.length = list(words), length
        self.index = {word: SPECIAL + i for i, word in enumerate(words)}

    def __len__(self):
        """V, the number of different tokens."""
        return SPECIAL + len(self.words)

    def encode(self, prompts):
        """list of N str -> tokens (N, L) int64: begin, words, padding. Words beyond the length are cut off."""
        tokens = torch.full((len(prompts), self.length), PAD)
        for row, prompt in zip(tokens, prompts, strict=True):
            numbers = [BEGIN] + [self.index.get(word, UNKNOWN) for word in split(prompt)]
            row[:len(numbers)] = torch.tensor(numbers[:self.length])
        return tokens

    def decode(self, tokens):
        """tokens (N, L) -> list of N str; unknown words read <unk>."""
        names = ["", "", "<unk>", *self.words]
        return [" ".join(names[i] for i in row if i not in (PAD, BEGIN)) for row in tokens.tolist()]

    def unknown(self, prompt):
        """The words of a prompt that are not in the vocabulary, each once, in order."""
        return [word for word in dict.fromkeys(split(prompt)) if word not in self.index]


# -------------------------------------------------------------------------------------------------------- the encoder


class TextEncoder(nn.Module):
    """Tokens (N, L) -> context (N, L, dim): word embedding plus sinusoidal position, `layers` transformer blocks.

    Made of Linear, LayerNorm and Embedding layers, those for which dp_sgd.py knows the per-example gradient, and
    without dropout. Padding is masked inside, and by `mask` wherever the context is attended to, so that a longer padding
    changes nothing. With null_class the empty prompt means "no condition" (classifier-free guidance).
    """

    def __init__(self, vocabulary_size, dim, length, width=64, layers=2, heads=4, null_class=True):
        super().__init__()
        if width % (2 * heads):
            raise ValueError(f"the text encoder's width {width} must be even and divisible by its {heads} heads")
        self.dim, self.length, self.null_class = dim, length, null_class
        self.embedding = nn.Embedding(vocabulary_size, width)
        angles = torch.arange(length)[:, None] * torch.exp(-math.log(10000) * torch.arange(0, width, 2) / width)
        self.register_buffer("positions", torch.cat([angles.sin(), angles.cos()], 1), persistent=False)  # (length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, dim)

    def forward(self, tokens):
        if tokens.shape[1] > self.length:
            raise ValueError(f"prompts of {tokens.shape[1]} tokens, but this encoder knows {self.length} positions")
        x = self.embedding(tokens) + self.positions[:tokens.shape[1]]  # (N, L, width)
        mask = self.mask(tokens)[:, None, None]  # (N, 1, 1, L): the same for every head and every asking token
        for block in self.blocks:
            x = block(x, mask)
        return self.out(self.norm(x))

    def mask(self, tokens):
        """(N, L) bool: True where there is a token to attend to. Never all False: every prompt has its begin."""
        return tokens != PAD

    def null(self, tokens):
        """Empty prompts in the shape of tokens. Raises ValueError if the model was not trained with dropped conditions."""
        if not self.null_class:
            raise ValueError("this model has not seen empty prompts, so guidance other than 1 and condition dropping are not "
                             "possible; train with --cond-drop above 0 or use guidance 1")
        empty = torch.full_like(tokens, PAD)
        empty[:, 0] = BEGIN
        return empty


class Block(nn.Module):
    """Self-attention and a feed-forward net, each behind a LayerNorm and around a residual (Vaswani et al. 2017)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x, mask):
        """x (N, L, width), mask (N, 1, 1, L) -> (N, L, width)."""
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        scores = ((q * q.shape[-1] ** -0.5) @ k.mT).masked_fill(~mask, float("-inf"))  # (N, heads, L, L)
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))  # prompts are short: no fused kernel is needed
        return x + self.down(F.gelu(self.up(self.norm2(x))))


if __name__ == "__main__":
    _generator = torch.Generator().manual_seed(0)
    _names = sorted(name for slot in SLOTS for name in slot) + ["Male"]
    for _ in range(10):
        print(caption({name: float(torch.rand((), generator=_generator)) < 0.2 for name in _names}, _generator))
    print(class_caption("frog", _generator), class_caption("7", _generator), sep="\n")
