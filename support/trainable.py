"""What --tune names: layers to insert, then the parameters that are trained."""
import tuning
from extensions import lora, shift


def choose(model, s):
    """Choose what is trained by the settings s.tune and s.from_block, freeze the rest -> names of parameters.

    "NAME+shift" trains what NAME does, and a shift of the latents, which is inserted (extensions/shift.py);
    "shift" trains the shift alone. ValueError for what cannot be selected.
    """
    base = s.tune.removesuffix("+shift")
    if s.tune != "shift":
        selected(model, base, s.from_block)
    elif s.from_block:
        raise ValueError("from_block only applies to attention and lora tuning, not to tune='shift'")
    else:
        model.requires_grad_(False)
    if s.tune == "shift" or base != s.tune:
        shift.insert(model, s.vae.latent_shape, s.schedule)
    return [name for name, p in model.named_parameters() if p.requires_grad]


def selected(model, name, from_block):
    """`tuning.select_trainable`; "lora:RANK" inserts pairs of matrices and trains them and the embedder."""
    kind, colon, rank = name.partition(":")
    if kind != "lora" or not colon:
        if name not in tuning.TUNE:
            raise ValueError(f"unknown tune={name!r}; choose one of {', '.join(tuning.TUNE)}, lora:RANK or "
                             "shift, or one of them and +shift")
        return tuning.select_trainable(model, name, from_block)
    if not rank.isdecimal() or int(rank) < 1:
        raise ValueError(f"tune={name!r}: the rank after 'lora:' must be a whole number of at least 1")
    pairs = lora.insert(model, int(rank), from_block)
    return tuning.train_only(model, [*pairs, *tuning.embedder_of(model)])
