"""Sample a prompt, or compare methods, from a checkpoint.

    python sample_toy.py --prompt "a red seven on blue" --method erg --w 2 --tau-i 0.3 --layers 1:3
    python sample_toy.py --dataset mnist --compare           # all methods, in one table and picture
    python sample_toy.py --compare --method cfg --w 3        # one of them

The checkpoint is OUT/DATASET.pt, which train_toy.py writes, or else weights/DATASET.pt. Settings that are
not given are the data set's. Conventions: t = 0 is noise, t = 1 is data; w = 1 is no guidance. See erg.py.
"""
import argparse
import sys
from pathlib import Path

from toy import data
from toy.drawing import compare, draw_grid
from toy.sampling import (METHODS, WEIGHTS, choose_device, generate, load_checkpoint, prepare, recommended)

COMPARED = ("none", "cfg", "c-erg", "i-erg", "erg", "erg+apg", "erg+cads")
PARAMETERS = ("w", "tau_i", "tau_c", "alpha", "gamma", "K", "kappa", "layers", "negative")


def load(options):
    """(model, classifier, reference, path) of --checkpoint, or of the newest that fits --dataset."""
    own, shipped = (folder / f"{options.dataset}.pt" for folder in (Path(options.out), WEIGHTS))
    path = Path(options.checkpoint) if options.checkpoint else own if own.is_file() else shipped
    model, classifier, reference, _ = load_checkpoint(path, choose_device(options.device))
    if model.config.image_size != data.SIZES[options.dataset]:
        raise ValueError(f"checkpoint={str(path)!r} was not trained on dataset={options.dataset!r}")
    return model, classifier, reference, path


def compare_methods(options, given):
    """The table and picture of --method, or of COMPARED, each with the settings that it obeys."""
    if options.method:
        methods = {options.method: recommended(options.method, options.dataset, **given)}
    else:
        methods = {}
        for name in COMPARED:
            obeyed = METHODS[name].required + METHODS[name].optional
            mine = {parameter: value for parameter, value in given.items() if parameter in obeyed}
            methods[name] = recommended(name, options.dataset, **mine)
    for name, parameters in methods.items():
        prepare(name, **parameters)  # a fault shows now
    model, classifier, reference, path = load(options)
    held_out = data.load(options.dataset, options.data_dir, "test")
    picture = Path(options.picture or Path(options.out) / f"{options.dataset}.png")
    table = compare(model, classifier, reference, held_out, methods, picture, samples=options.samples,
                    steps=options.steps, seed=options.seed, title=path.name)
    print(f"Picture: {picture}")
    return table


def sample_prompt(options, given):
    """--count images of the prompt, written as a picture; returns them."""
    method = options.method or "erg"
    parameters = recommended(method, options.dataset, **given)
    prepared = prepare(method, **parameters)
    if not options.prompt.split() and method in ("cfg", "c-erg"):
        raise ValueError(f"method={method!r} has no effect with an empty prompt; use i-erg")
    model, _, _, path = load(options)
    images = generate(model, [options.prompt] * options.count, prepared, options.steps, options.seed)
    picture = Path(options.picture or Path(options.out) / f"{method}.png")
    settings = ", ".join(f"{name} = {value}" for name, value in parameters.items())
    columns = [f"seed {options.seed}"] + [""] * (options.count - 1)
    draw_grid({METHODS[method].label: images}, columns, picture, f"“{options.prompt}” {settings}")
    print(f"{path}: {options.count} images of {options.prompt!r} by {method}, {settings} -> {picture}")
    return images


def layer_range(text):
    """"3:6" -> range(3, 6): layers 3, 4 and 5."""
    first, colon, end = text.partition(":")
    if not (colon and first.isdigit() and end.isdigit() and int(first) < int(end)):
        raise argparse.ArgumentTypeError(f"layers={text!r} must be FIRST:END, for example 3:6")
    return range(int(first), int(end))


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--prompt", help='for example "a red seven on blue"; "" is unconditional')
    add("--compare", action="store_true", help="a table and a picture of all methods, or of --method")
    add("--method", choices=METHODS, help="erg if not given, or all with --compare")
    add("--dataset", default="digits", choices=data.NAMES, help="whose weights and settings (digits)")
    add("--checkpoint", help="a file of weights: OUT/DATASET.pt or weights/DATASET.pt if not given")
    add("--data-dir", help="with --compare: folder with the official files, downloaded when missing")
    add("--out", default="out", help="folder for the picture (out)")
    add("--picture", help="file to write: OUT/METHOD.png or OUT/DATASET.png if not given")
    add("--count", default=8, type=int, help="images of the prompt (8)")
    add("--samples", default=1000, type=int, help="with --compare: images a row (1000)")
    add("--steps", default=25, type=int, help="Euler steps (25)")
    add("--seed", default=0, type=int, help="of the noise (0)")
    add("--device", choices=("cuda", "mps", "cpu"), help="chosen automatically when not given")
    add = parser.add_argument_group("settings of the method").add_argument
    add("--w", type=float, help="guidance weight; 1 is off")
    add("--tau-i", type=float, help="I-ERG: temperature in the denoiser; below 1 flattens attention")
    add("--tau-c", type=float, help="C-ERG: temperature in the caption encoder")
    add("--alpha", type=float, help="I-ERG: weight of the matching term in the energy")
    add("--gamma", type=float, help="I-ERG: step size of energy attention")
    add("--K", type=int, help="I-ERG: steps of energy attention")
    add("--kappa", type=float, help="I-ERG acts where t > kappa")
    add("--layers", type=layer_range, help="I-ERG's layers, for example 3:6 for 3, 4 and 5")
    add("--negative", choices=("null", "same"), help="condition of I-ERG's negative")
    return parser


def main(**given):
    """Run as the command line does: `main(prompt="seven", w=2.0)`; returns the images, or the table."""
    options = arguments().parse_args([])
    for name, value in given.items():
        if not hasattr(options, name):
            raise TypeError(f"main() has no option {name!r}; it has: {', '.join(sorted(vars(options)))}")
        setattr(options, name, value)
    if (options.prompt is None) != options.compare:
        raise ValueError("give either a prompt or compare, and not both")
    for name, least in (("steps", 1), ("count", 1), ("samples", 6)):
        if getattr(options, name) < least:
            raise ValueError(f"{name}={getattr(options, name)} must be at least {least}")
    settings = {name: getattr(options, name) for name in PARAMETERS}
    return (compare_methods if options.compare else sample_prompt)(options, settings)


if __name__ == "__main__":
    try:
        main(**vars(arguments().parse_args()))
    except (data.DataError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
