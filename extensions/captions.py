"""Captions: one English sentence about the attributes or the class of an image.

*Differentially Private Latent Diffusion Models* (Liu et al. 2024, text-to-image experiment) uses captions of
CelebA-HQ that were made from its 40 attributes. This file makes such captions by a small grammar of its own.
It imports nothing of the project.

    {"Male": False, "Smiling": True, ...} -> "a smiling young woman with black hair and eyeglasses"

Run it alone: `python -m extensions.captions` prints captions.
"""
import torch

# ------------------------------------------------------------------------------------------------ the grammar

# What a true attribute may be called, by its place in the sentence. Names are CelebA's 40 (Liu et al. 2015)
# and three of other face sets; an attribute that is not listed is called by its name.
ADJECTIVES = {
    "Attractive": ("attractive", "good-looking"), "Bald": ("bald",), "Chubby": ("chubby", "plump"),
    "Senior": ("elderly", "old"), "Smiling": ("smiling", "cheerful"), "Young": ("young", "youthful"),
}
PICTURES = {"Blurry": ("blurry", "blurred", "out-of-focus"), "Grayscale": ("grayscale", "black-and-white")}
TEXTURES = {"Straight_Hair": ("straight",), "Wavy_Hair": ("wavy",)}
COLOURS = {
    "Black_Hair": ("black",), "Blond_Hair": ("blond", "blonde"), "Brown_Hair": ("brown",),
    "Gray_Hair": ("gray", "grey"),
}
FEATURES = {
    "5_o_Clock_Shadow": ("a five o'clock shadow", "stubble"),
    "Arched_Eyebrows": ("arched eyebrows", "curved eyebrows"),
    "Bags_Under_Eyes": ("bags under the eyes",),
    "Bangs": ("bangs", "a fringe"),
    "Big_Lips": ("big lips", "full lips"),
    "Big_Nose": ("a big nose", "a large nose"), "Bushy_Eyebrows": ("bushy eyebrows", "thick eyebrows"),
    "Double_Chin": ("a double chin",),
    "Goatee": ("a goatee", "a goatee beard"),
    "High_Cheekbones": ("high cheekbones",),
    "Mouth_Slightly_Open": ("a slightly open mouth", "parted lips"),
    "Mustache": ("a mustache", "a moustache"),
    "Narrow_Eyes": ("narrow eyes",),
    "No_Beard": ("no beard", "a clean-shaven face"),
    "Oval_Face": ("an oval face",),
    "Pale_Skin": ("pale skin", "a pale complexion"), "Pointy_Nose": ("a pointy nose", "a pointed nose"),
    "Receding_Hairline": ("a receding hairline",),
    "Rosy_Cheeks": ("rosy cheeks", "red cheeks"),
    "Sideburns": ("sideburns",),
}
WORN = {
    "Eyeglasses": ("eyeglasses", "glasses"), "Heavy_Makeup": ("heavy makeup", "a lot of makeup"),
    "Wearing_Earrings": ("earrings",), "Wearing_Hat": ("a hat",), "Wearing_Lipstick": ("lipstick",),
    "Wearing_Necklace": ("a necklace",), "Wearing_Necktie": ("a necktie", "a tie"),
}
SLOTS = (ADJECTIVES, PICTURES, TEXTURES, COLOURS, FEATURES, WORN)
PHRASES = {(name, True): (slot, phrases)
           for slot, table in enumerate(SLOTS) for name, phrases in table.items()}
PHRASES |= {("Young", False): (0, ("older", "middle-aged")),
            ("No_Beard", False): (4, ("a beard", "facial hair"))}
NOUNS = {  # (Child, Male), None where the set does not say
    (True, True): ("boy",),
    (True, False): ("girl",),
    (True, None): ("child", "kid"),
    (False, None): ("adult",),
    (False, True): ("man", "guy"), (False, False): ("woman", "lady"), (None, None): ("person",),
    (None, True): ("man", "guy"), (None, False): ("woman", "lady"),
}
FRAMES = ("", "a photo of ", "a picture of ", "a portrait of ", "an image of ")
# All other words that `caption` and `class_caption` write, for text.vocabulary.
GLUE = "a an the and of with without wearing not hair photo picture letter digit"


def caption(attributes, generator, omit=0.2, deny=0.02):
    """One English sentence about one image: {attribute name: bool} -> str, "a bald man wearing glasses".

    Wording and order are random, drawn from `generator` (CPU). omit: probability that a true attribute goes
    unsaid; deny: that a false one is said ("without a hat"). "Male" and "Child" choose the noun and are
    always said. An attribute that the grammar does not know is said by its name: "Dark_Photo" gives
    ", dark photo". A false "Young" and a false "No_Beard" have words of their own ("older", "with a beard"),
    so they count as true ones.
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
        unknown = None, (name.replace("_", " ").lower(),)  # what an attribute without phrases is called
        if value or (name, value) in PHRASES:
            slot, phrases = PHRASES.get((name, value), unknown)
            if not chance(omit):
                (rest if slot is None else said[slot]).append(pick(phrases))
        elif chance(deny):
            _, phrases = PHRASES.get((name, True), unknown)
            hair = " hair" if name in TEXTURES or name in COLOURS else ""
            denial = "without " if hair or name in FEATURES or name in WORN else "not "
            rest.append(denial + pick(phrases) + hair)
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
    # A tuple, because the empty string is in every string.
    return ("an " if phrase[:1].lower() in tuple("aeiou") else "a ") + phrase


def listed(items):
    """["a", "b", "c"] -> "a, b and c"."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def class_caption(class_name, generator):
    """One sentence about an image of a class: "frog" -> "a photo of a frog", "7" -> "the digit 7"."""
    name = class_name.replace("_", " ").lower()
    frame = FRAMES[int(torch.randint(len(FRAMES), (), generator=generator))]
    if len(name) == 1 and name.isalnum():  # "a photo of an a" would be hard to tell from its article
        return f"{frame}the {'digit' if name.isdigit() else 'letter'} {name}"
    return frame + article(name)


if __name__ == "__main__":
    _generator = torch.Generator().manual_seed(0)
    _names = sorted(name for slot in SLOTS for name in slot) + ["Male"]
    for _ in range(10):
        _true = {name: float(torch.rand((), generator=_generator)) < 0.2 for name in _names}
        print(caption(_true, _generator))
    print(class_caption("frog", _generator), class_caption("7", _generator), sep="\n")
