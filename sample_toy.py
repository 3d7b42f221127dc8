"""Sample a prompt, or compare methods, from a checkpoint.

    python sample_toy.py --prompt "a red seven on blue" --method erg --w 2 --tau-i 0.3 --layers 1:3
    python sample_toy.py --dataset mnist --compare           # all methods, in one table and picture
    python sample_toy.py --compare --method cfg --w 3        # one of them

The checkpoint is OUT/DATASET.pt, which train_toy.py writes, or else weights/DATASET.pt. Settings that are
not given are the data set's. Conventions: t = 0 is noise, t = 1 is data; w = 1 is no guidance. See erg.py.
"""
import argparse
import re
from pathlib import Path

from toy import data, files
from toy.command import SEED, Parser, number, place, run
from toy.drawing import compare, draw_grid
from toy.sampling import (METHODS, WEIGHTS, choose_device, generate, load_checkpoint, prepare, recommended)

COMPARED = ("none", "cfg", "c-erg", "i-erg", "erg", "erg+apg", "erg+cads")
PARAMETERS = ("w", "tau_i", "tau_c", "alpha", "gamma", "K", "kappa", "layers", "negative")


def load(options, picture):
    """(model, classifier, reference, path) of the checkpoint; an error if it or `picture` does not fit."""
    files.writable(picture)
    own, shipped = (folder / f"{options.dataset}.pt" for folder in (Path(options.out), WEIGHTS))
    path = Path(options.checkpoint) if options.checkpoint else own if own.is_file() else shipped
    model, classifier, reference, _ = load_checkpoint(path, choose_device(options.device))
    if model.config.image_size != data.SIZES[options.dataset]:
        raise ValueError(f"checkpoint={str(path)!r} was not trained on dataset={options.dataset!r}")
    if options.layers and options.layers.stop > model.config.depth:
        raise ValueError(f"layers={options.layers} must end at most with the depth, {model.config.depth}")
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
    picture = Path(options.picture or Path(options.out) / f"{options.dataset}.png")
    model, classifier, reference, path = load(options, picture)
    held_out = data.load(options.dataset, options.data_dir, "test")
    table = compare(model, classifier, reference, held_out, methods, picture, samples=options.samples,
                    steps=options.steps, seed=options.seed, title=path.name)
    print(f"Picture: {picture}")
    return table


def sample_prompt(options, given):
    """--count images of the prompt, written as a picture; returns them."""
    method = options.method or "erg"
    parameters = recommended(method, options.dataset, **given)
    prepared = prepare(method, **parameters)
    if not options.prompt.split() and method in ("cfg", "apg", "c-erg"):
        raise ValueError(f"method={method!r} has no effect with an empty prompt; use i-erg")
    picture = Path(options.picture or Path(options.out) / f"{method}.png")
    model, _, _, path = load(options, picture)
    images = generate(model, [options.prompt] * options.count, prepared, options.steps, options.seed)
    settings = ", ".join(f"{name} = {value}" for name, value in parameters.items())
    columns = [f"seed {options.seed}"] + [""] * (options.count - 1)
    draw_grid({METHODS[method].label: images}, columns, picture, f"“{options.prompt}” {settings}")
    print(f"{path}: {options.count} images of {options.prompt!r} by {method}, {settings} -> {picture}")
    return images


def layer_range(text):
    """"3:6" -> range(3, 6): layers 3, 4 and 5. "range(3, 6)" is the same, from Python."""
    ends = re.fullmatch(r"(?:range\()?([0-9]{1,3})(?::|, )([0-9]{1,3})\)?", text)
    if not ends or int(ends[1]) >= int(ends[2]):
        raise argparse.ArgumentTypeError(f"{text} must be FIRST:END, for example 3:6")
    return range(int(ends[1]), int(ends[2]))


def arguments():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--prompt", help='for example "a red seven on blue"; "" is unconditional')
    add("--compare", action="store_true", help="a table and a picture of all methods, or of --method")
    add("--method", choices=METHODS, help="erg if not given, or all with --compare")
    add("--dataset", default="digits", choices=data.NAMES, help="whose weights and settings (digits)")
    add("--checkpoint", type=place, help="weights: OUT/DATASET.pt or weights/DATASET.pt if not given")
    add("--data-dir", type=place,
        help="with --compare: folder with the official files, downloaded when missing")
    add("--out", default="out", type=place, help="folder for the picture (out)")
    add("--picture", type=place, help="file to write: OUT/METHOD.png or OUT/DATASET.png if not given")
    add("--count", default=8, type=number(1, 100, int), help="images of the prompt (8)")
    add("--samples", default=1000, type=number(6, 10**5, int), help="with --compare: images a row (1000)")
    add("--steps", default=25, type=number(1, 1000, int), help="Euler steps (25)")
    add("--seed", default=0, type=number(0, SEED, int), help="of the noise (0)")
    add("--device", choices=("cuda", "mps", "cpu"), help="chosen automatically when not given")
    add = parser.add_argument_group("settings of the method").add_argument
    add("--w", type=number(-100, 100), help="guidance weight; 1 is off")
    add("--tau-i", type=number(0, 100), help="I-ERG: temperature in the denoiser; below 1 flattens attention")
    add("--tau-c", type=number(0, 100), help="C-ERG: temperature in the caption encoder")
    add("--alpha", type=number(-100, 100), help="I-ERG: weight of the matching term in the energy")
    add("--gamma", type=number(1e-6, 100), help="I-ERG: step size of energy attention")
    add("--K", type=number(1, 100, int), help="I-ERG: steps of energy attention")
    add("--kappa", type=number(0, 1), help="I-ERG acts where t > kappa")
    add("--layers", type=layer_range, help="I-ERG's layers, for example 3:6 for 3, 4 and 5")
    add("--negative", choices=("null", "same"), help="condition of I-ERG's negative")
    return parser


def main(**given):
    """Run as the command line does: `main(prompt="seven", w=2.0)`; returns the images, or the table."""
    parser = arguments()
    options = parser.options(given)
    if (options.prompt is None) != options.compare:
        raise ValueError("give either --prompt or --compare, and not both")
    idle, mode = (("count",), "with") if options.compare else (("samples", "data_dir"), "without")
    for name in idle:
        if (value := getattr(options, name)) != parser.get_default(name):
            raise ValueError(f"{name}={value!r} has no effect {mode} --compare")
    settings = {name: getattr(options, name) for name in PARAMETERS}
    return (compare_methods if options.compare else sample_prompt)(options, settings)


if __name__ == "__main__":
    run(main, arguments())
