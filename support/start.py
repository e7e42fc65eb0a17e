"""From the command line to a run that may begin: settings, existing public networks, the two image sets.

What can be checked is checked here, before the first long loop: nobody waits an hour to learn that a file is
missing. The guarantee depends on one of these checks: no private image may be known to a public network
(pitfall 29).
"""
import sys
from functools import partial

import torch

import datasets
import diffusion
import unet
import vae
from extensions import vote
from support import checkpoints, conditions, files, hardware, run_folder, settings, trainable
from support.team import from_rank0, join, once, own_device, rank, world

NAMES = ("vae.pt", "ldm.pt")
# The authors' public sets, n and classes, for a --dry-run where they are not at hand.
ASSUMED = {"folder:imagenet/train": (1_281_167, 1000), "folder:laion": (1_000_000, 1)}


def settings_of(argv):
    """Command line -> (settings, {"vae.pt": checkpoint, "ldm.pt": checkpoint} of existing public networks).

    The networks are those of the run to be resumed, or of --init. Raises ValueError, one line, for what
    cannot be.
    """
    join()
    s = once(settings.parse, sys.argv[1:] if argv is None else argv)
    s.device = own_device(s.device)
    if s.resume:
        paths = [s.out / "public" / name for name in NAMES]
        known = {path.name: checkpoints.load_public(path) for path in paths if path.exists()}
        # The plan is written when both are there.
        if len(known) < 2 and ("ldm.pt" in known or (s.out / "internal" / "plan.json").exists()):
            raise ValueError("cannot resume: public/vae.pt or public/ldm.pt is missing, and a network "
                             "trained anew would not fit the other files; bring it back from a copy; "
                             f"{run_folder.ADD_UP}")
    else:
        once(run_folder.refuse_used, s.out, s.dry_run)  # before hours of reading, and in a --dry-run as well
        known = adopt(s) if s.init else {}
    s.bf16 = from_rank0(hardware.choose_bf16(s.precision, s.device))
    for key, value in (("size", s.vae.resolution), ("factor", 2 ** (len(s.vae.ch_mult) - 1)),
                       ("latent_channels", s.vae.embed_dim), ("width", s.unet.model_channels),
                       ("depth", s.unet.num_res_blocks), ("prediction", s.schedule.prediction)):
        if getattr(s, key) not in (None, value):
            flag = settings.flag(key)
            raise ValueError(f"{flag} {getattr(s, key)}: the network of {s.init} has {value}; leave out "
                             f"{flag}, or --init")
    if s.unet.in_channels != s.vae.embed_dim:
        raise ValueError(f"the UNet of preset {s.preset} takes {s.unet.in_channels} latent channels, the "
                         f"autoencoder makes {s.vae.embed_dim}: use --init with runs of this preset only")
    side, halvings = s.vae.resolution // 2 ** (len(s.vae.ch_mult) - 1), len(s.unet.channel_mult) - 1
    if side % 2 ** halvings:
        raise ValueError(f"latents of {side} x {side} cannot be halved {halvings} times, as this UNet does: "
                         "choose a smaller --factor, or another --size")
    for name, batch, flag in ((NAMES[0], s.vae_batch, "--vae-batch"), (NAMES[1], s.ldm_batch, "--ldm-batch")):
        if name not in known and batch < world():
            raise ValueError(f"{world()} processes cannot share a public batch of {batch}: choose a larger "
                             f"{flag}, or fewer processes")
    settings.check_sampling(s)  # again: the noise schedule may be that of --init now
    return s, known


def adopt(s):
    """The public networks of the run --init, as they are. The settings follow what their checkpoints say.

    The diffusion model is left out where there is none, or where it has another kind of condition.
    """
    known = {"vae.pt": checkpoints.load_public(s.init / "public" / "vae.pt")}
    s.vae = vae.VAEConfig(**known["vae.pt"]["config"])
    path = s.init / "public" / "ldm.pt"
    if path.exists():
        ldm = checkpoints.load_public(path)
        if (made := checkpoints.condition_kind(ldm["embedder"])) == s.condition:
            known["ldm.pt"] = ldm
            s.unet, s.schedule = unet.UNetConfig(**ldm["unet"]), diffusion.Schedule(**ldm["schedule"])
            if not (ldm["embedder"] and ldm["embedder"]["null_class"]):
                if "cond_drop" in s.given and s.cond_drop:
                    print(f"note: --cond-drop has no effect, the network of {s.init} has no null condition")
                s.cond_drop = 0.0
        else:  # another condition needs another diffusion model, but not another autoencoder
            print(f"note: {s.init} was trained with --condition {made}; only its autoencoder is reused")
    else:
        print(f"note: {s.init} has no diffusion model; only its autoencoder is reused")
    public = datasets.kind_of(s.public)
    origin = str(known.get("ldm.pt", {}).get("trained_on", public))
    if origin != public and not origin.startswith("weights of "):  # those are of elsewhere
        print(f"note: the networks of {s.init} were trained on {origin}; images of --public {s.public} only "
              "stand beside the samples, and the feature network of evaluate.py learns them")
    for key in s.given:
        if key in settings.VAE_FLAGS or "ldm.pt" in known and key in settings.LDM_FLAGS | {"public_n"}:
            print(f"note: {settings.flag(key)} has no effect, the networks of {s.init} are taken as they are")
    for checkpoint in known.values():
        classes = checkpoint.get("public_classes", s.public_classes)
        drawn = (datasets.parts(s.public)[0] == "strokes"
                 and checkpoint.get("trained_on") == datasets.kind_of(s.public))
        if drawn and classes != s.public_classes:
            raise ValueError(f"--public-classes {s.public_classes}: {s.init} was trained on {classes}; say "
                             f"--public-classes {classes}, or leave out --init")
    return known


# --------------------------------------------------------------------------------------------- the image sets


def read_sets(s, known):
    """(public, private, public_facts): two ImageSets of images (N, C, H, W) uint8, in the autoencoder's size.

    public_facts: what a public checkpoint says of its set: name, classes, digests of its images, votes on
    them. In a dry run only the votes.
    known: the public networks that exist already. With --steps 0 no private image is read. Raises ValueError,
    one line, for sets that do not fit, and for private images that a public network knows.
    Side effect: s.crop becomes the side of a finished image.
    """
    origins = {s.public, *(str(c.get("trained_on")) for c in known.values())}
    # With --steps 0 too: the statement then says that no private image was read.
    if any(datasets.same_images(origin, s.private, s.data_root) for origin in origins):
        raise ValueError(f"--private {s.private}: the public networks know these images "
                         f"({', '.join(sorted(origins))}), so nothing would be private; choose another "
                         "private or public set")
    declared = s.classes and datasets.class_list(s.classes)
    if s.steps:
        find_private = partial(find_set, s, s.private, n=s.private_n, label_attribute=s.label_attribute,
                               private=True, classes=declared)
    else:  # names of classes and attributes only
        find_private = partial(datasets.describe, s.private, s.data_root, s.vae.resolution, s.vae.in_channels,
                               s.label_attribute, declared)

    def read():
        find_private()
        if not datasets.is_drawn(s.public):
            public_set(s, known)

    if world() > 1:  # one process downloads what is missing, and tells what is wrong with it
        once(read)
    private, public = find_private(), public_set(s, known)
    for title, found in (("--public", public), ("--private", private)):
        if found.images.shape[1] != s.vae.in_channels:
            raise ValueError(f"{title} {found.name} has {found.images.shape[1]} colour channels, the "
                             f"autoencoder of preset {s.preset} takes {s.vae.in_channels}: choose another "
                             "preset or set")
        if (note := datasets.enlarged(found.name, s.vae.resolution)) and rank() == 0:
            print(f"note: {note}", file=sys.stderr)
    s.crop = private.side  # samples look like private images, whose padding is cut off again
    before = votes(s, known)
    if s.dry_run:
        return public, private, {"before": before}
    digests = public_digests(s, public.images)
    if s.steps:
        once(refuse_known, s, private.images, digests, known.values())
    public_facts = {"trained_on": datasets.kind_of(s.public), "public_classes": s.public_classes,
                    "classes": public.classes, "digests": digests, "before": before}
    return public, private, public_facts


def votes(s, known):
    """The votes on drawings from which public images and networks came, see `vote.cost`: {checksum: vote}.

    By the checksum of its result a vote counts once, also where both networks and the images come from it.
    It counts for every private set: nobody knows whether that set has images in common with the one that
    voted. ValueError, one line, if a network does not say what it should.
    """
    found = [vote.cost(datasets.place(name, s.data_root)) for name in datasets.parts(s.public)
             if datasets.kind_of(name) == "voted"]
    for name, checkpoint in known.items():
        before = checkpoint.get("before")
        if before is None and "voted" in str(checkpoint.get("trained_on")):
            raise ValueError(f"public/{name} was trained on drawings that private images voted for, and does "
                             "not say what that has cost; train it again")
        with files.understanding(f"public/{name}", "public checkpoint"):
            found.append({str(key): vote.checked(value) for key, value in (before or {}).items()})
    return vote.merged(found)


def public_set(s, known=()):
    """The settings' public ImageSet. known: the public networks that exist already.

    Where no network is trained on it, few drawings are enough: to show some beside the samples, or to know
    their form.
    """
    n = s.public_n
    drawn = any(map(datasets.is_drawn, datasets.parts(s.public)))
    if drawn and (s.dry_run or "ldm.pt" in known):
        n = min(n or 1000, 200 if s.dry_run else 1000)
    strokes = datasets.parts(s.public)[0] == "strokes"  # asked of another set, the flag is refused
    return find_set(s, s.public, n=n, seed=s.seed, label_attribute=s.label_attribute,
                    public_classes=s.public_classes if strokes or "public_classes" in s.given else None)


def find_set(s, name, **kwargs):
    """datasets.load as the settings ask. For a dry run see `ASSUMED`."""
    size, channels = s.vae.resolution, s.vae.in_channels
    try:
        return datasets.load(name, "train", s.data_root, size, channels=channels, cache=s.cache,
                             decode=not s.dry_run, **kwargs)
    except datasets.DataError as error:
        entry = datasets.REGISTRY[datasets.kind_of(name)]
        n, classes = ASSUMED.get(name, (entry.n, len(entry.classes) or 2))
        n = kwargs.get("n") or n
        if not s.dry_run or not n:
            raise
        print(f"ASSUMED        n {n:,} and {classes} classes: {error}")
        images = torch.empty(n, channels, size, size, dtype=torch.uint8, device="meta")
        names = [str(label) for label in range(classes)]
        return datasets.ImageSet(images, torch.zeros(n, dtype=torch.int64), names, side=size, name=name)


def public_digests(s, images):
    """datasets.digests of the public images (N, C, H, W); none if all are drawn: nothing private is there."""
    return datasets.digests(images[:0] if datasets.is_drawn(s.public) else images)


def refuse_known(s, private, digests, stages):
    """Refuse private images (N, C, H, W) uint8 that a public network was trained on, wherever they came from.

    digests: of the public set at hand; stages: the public checkpoints that exist already, with their digests.
    """
    known = [digests]
    for checkpoint in stages:
        own, origin = checkpoint.get("digests"), str(checkpoint.get("trained_on"))
        if isinstance(own, torch.Tensor) and own.dtype == torch.int64:
            known.append(own.flatten())
        elif not datasets.is_drawn(origin):
            raise ValueError(f"the public networks (trained on {origin}) were made before digests of their "
                             "images were recorded, so private images may be among them: train the public "
                             "stages again")
    if torch.isin(datasets.digests(private), torch.cat(known)).any():
        raise ValueError(f"--private {s.private}: images of it are among those that the public networks were "
                         "trained on, so nothing would be private; choose another private or public set")


def embedder(s, known, public, private):
    """The condition embedder's entry in the checkpoints: of the networks at hand, else as the settings ask.

    Refuses a wrong --tune and a public model of too few classes (ValueError), and says which words the public
    model does not know: all before any work.
    """
    entry = (known["ldm.pt"]["embedder"] if "ldm.pt" in known
             else conditions.embedder_entry(s, public, private))
    conditions.check_classes(entry, private.classes)
    with torch.device("meta"):  # no memory, no time
        trainable.choose(unet.LatentModel(unet.UNet(s.unet), checkpoints.build_embedder(entry)), s)
    names = ", ".join(private.classes)
    print(f"classes        {len(private.classes)}, these names are published: "
          f"{names[:200]}{'...' * (len(names) > 200)}")
    if s.condition == "text" and rank() == 0:
        conditions.warn_of_unknown_words(s, public, private, entry)
    return entry
