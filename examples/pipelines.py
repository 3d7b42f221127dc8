"""For pipelines of diffusers that run the model twice a step, the negative second (Flux, Wan, ...).

    from pipelines import second_forward    # beside erg.py
    with erg.rectify(pipe.transformer, tau=0.01, layers=layers, queries=slice(-image, None),
                     when=second_forward(lambda timestep: 1 - timestep > 0.3)):
        images = pipe(prompt, negative_prompt="", true_cfg_scale=4.0).images

MODELS.md has the lines for each pipeline.
"""


def second_forward(after):
    """A `when` for erg.rectify that is true in each second forward at a timestep, if after(timestep) is.

    timestep is the largest that the model is given, a number in its own units. after(timestep) is kappa:
    false for the first steps. Make a new one for each context.
    """
    last = None

    def when(*args, timestep, **kwargs):
        nonlocal last
        now = timestep.max().item()
        last = None if now == last else now
        return last is None and after(now)

    return when
