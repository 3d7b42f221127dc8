"""ERG in the modular pipelines of diffusers: a guider to put in the place of ClassifierFreeGuidance.

    from guider import EntropyRectifyingGuidance, weak_negative    # beside erg.py
    image_tokens = [0, (height // 16) * (width // 16)]     # SD3: image first; VAE factor 8, patches of 2 x 2
    guider = EntropyRectifyingGuidance(guidance_scale=5.0, tau_i=0.01, layers=range(6, 8), kappa=0.2,
                                       queries=image_tokens)
    pipe.update_components(guider=guider)
    encoders = {pipe.text_encoder: range(1, 10), pipe.text_encoder_2: range(1, 31),
                pipe.text_encoder_3: range(1, 22)}
    with weak_negative(encoders, tau=0.1):                 # C-ERG; without it, negative_prompt=""
        image = pipe(prompt="a red seven", negative_prompt="a red seven", output="images")[0]

I-ERG changes the attention of the evaluation with the negative condition, at timesteps with t > kappa. Where
a pipeline has no negative condition, the prompt's takes its place: one evaluation a step up to kappa, two
after it. diffusers counts time the other way, t = 1 - timestep / num_train_timesteps. For flow matching this
is the model's own time, shift included. For models that predict noise it is the share of the training steps
that lies behind, not the time of an equivalent flow: choose kappa in that measure. Switch off caches that
skip blocks: they shift the layers' numbers. Guiders are experimental; this one is for diffusers 0.42.
"""
import contextlib
import dataclasses
import functools
import math
import weakref
from collections.abc import Iterable

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput

import erg


def _wrap_forward(denoiser, rectify, seen):
    """Rectify the denoiser's forwards and note their latents, until the result is called or one fails.

    The context is inside the forward, so that no exception, not even a KeyboardInterrupt, can leave it open.
    """
    original, own = denoiser.forward, denoiser.__dict__.get("forward")

    @functools.wraps(original)
    def forward(*args, **kwargs):
        seen["latents"] = kwargs.get("hidden_states")
        try:
            with erg.rectify(**rectify) if rectify else contextlib.nullcontext():
                return original(*args, **kwargs)
        except BaseException:
            restore()
            raise

    def restore():
        if denoiser.__dict__.get("forward") is forward:
            del denoiser.forward
            if own is not None:
                denoiser.forward = own

    denoiser.forward = forward
    return restore


class EntropyRectifyingGuidance(BaseGuidance):
    """Guider whose negative prediction comes from rectified attention. The config is plain JSON. See erg.ERG.

    guidance_scale: the paper's w, 1 is off. tau_i = alpha = gamma = K = 1 is classifier-free guidance.
    kappa: I-ERG acts where t > kappa.
    layers: numbers among the denoiser's self-attention calls (erg.attention_calls lists them); None is all.
    queries: [start, stop] of the image tokens in joint attention (Listing 2); None is all tokens.
    negative: None is the pipeline's negative condition if it has one, else the prompt's; "null" insists on
        the pipeline's; "same" is the prompt's, and pipelines are told to encode no negative prompt.
    apg: momentum, eta and norm_threshold of erg.APG in a dict, {} for the paper's. It needs predictions of
        the flow, noise - data, and the latents, which it takes from the denoiser's argument `hidden_states`.
    start, stop, enabled: as in ClassifierFreeGuidance, which counts them as shares of the steps.
    """

    _input_predictions = ["pred_cond", "pred_uncond"]
    rectifies_at = erg.Guidance.rectifies_at  # t > kappa, by self.settings

    @register_to_config
    def __init__(self, guidance_scale=5.0, tau_i=1.0, layers=None, kappa=0.2, alpha=1.0, gamma=1.0, K=1,
                 queries=None, negative=None, apg=None, num_train_timesteps=1000, start=0.0, stop=1.0,
                 enabled=True):
        super().__init__(start, stop, enabled)
        layers = list(layers) if isinstance(layers, Iterable) else layers
        part = isinstance(queries, slice) and queries.step is None
        ends = [queries.start, queries.stop] if part else queries
        if ends is not None and not (isinstance(ends, (list, tuple)) and len(ends) == 2
                                     and all(isinstance(end, (int, type(None))) for end in ends)):
            raise ValueError(f"queries={queries!r} must be [start, stop] or None")
        apg = dataclasses.asdict(apg) if isinstance(apg, erg.APG) else apg
        fields = erg.APG.__dataclass_fields__
        if apg is not None and not (isinstance(apg, dict) and set(apg) <= set(fields)):
            raise ValueError(f"apg={apg!r} must be a dict of {', '.join(fields)}, or None")
        for name, value, low in (("guidance_scale", guidance_scale, -math.inf),
                                 ("num_train_timesteps", num_train_timesteps, 0)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value < math.inf:
                raise ValueError(f"{name}={value!r} must be a finite number greater than {low}")
        self.settings = erg.ERG(w=guidance_scale, tau_i=tau_i, layers=layers, kappa=kappa, alpha=alpha,
                                gamma=gamma, K=K, queries=ends and slice(*ends), negative=negative,
                                apg=None if apg is None else erg.APG(**apg))
        layers, ends = layers and sorted({int(n) for n in layers}), ends and list(ends)
        self.register_to_config(layers=layers, queries=ends, apg=apg,
                                _use_default_values=[])  # else `new` forgets what was given by position
        for name, value in self.config.items():
            if not isinstance(value, (int, float, str, list, dict, type(None))):
                raise TypeError(f"{name}={value!r} must be a plain value that JSON can hold")
        self._running, self._seen, self._release, self._rectified = 0.0, {}, lambda: None, False

    guidance_scale = property(lambda self: self.settings.w)
    is_conditional = property(lambda self: self._count_prepared == 1)

    @property
    def num_conditions(self):
        """2 where pipelines should prepare a negative condition; evaluations may be fewer or more."""
        return 2 if self._enabled and self.settings.w != 1 and self.settings.negative != "same" else 1

    @property
    def t(self):
        timestep, last = float(self._timestep), self.config.num_train_timesteps
        t = 1 - timestep / last
        if not -1e-6 <= t <= 1 + 1e-6:
            raise ValueError(f"timestep {timestep} is not between 0 and num_train_timesteps={last}")
        return t

    def set_state(self, step, num_inference_steps, timestep):
        if self._step is None or step <= self._step or num_inference_steps != self._num_inference_steps:
            self._running = 0.0  # a new run: APG's momentum starts again
        self._release()
        super().set_state(step, num_inference_steps, timestep)

    def prepare_inputs_from_block_state(self, data, input_fields):
        pairs = self._pairs(input_fields)
        return self.prepare_inputs({key: (getattr(data, a, None), getattr(data, b, None))
                                    for key, (a, b) in pairs.items()})

    @staticmethod
    def _pairs(given):
        return {key: value if isinstance(value, tuple) else (value, value) for key, value in given.items()}

    def prepare_inputs(self, data):
        s, n = self.settings, self._num_inference_steps
        pairs = self._pairs(data)
        given = s.negative != "same" and any(b is not None and b is not a for a, b in pairs.values())
        guides = self._enabled and s.w != 1 and int(self._start * n) <= self._step < int(self._stop * n)
        if guides and not given and (s.negative == "null" or not s.rectifies):
            raise ValueError(f"negative={s.negative!r}: the pipeline gives no negative condition" + (
                "" if s.rectifies else ", and without I-ERG (tau_i) the prompt's is no contrast"))
        self._rectified = guides and s.rectifies and self.rectifies_at(self.t)
        batches = [self._prepare_batch(pairs, 0, "pred_cond")]
        if given and guides or self._rectified:
            batches.append(self._prepare_batch(pairs, int(given), "pred_uncond"))
        return batches

    def prepare_models(self, denoiser):
        self._release()
        super().prepare_models(denoiser)
        s, rectify = self.settings, None
        if self._rectified and not self.is_conditional:
            rectify = dict(tau=s.tau_i, alpha=s.alpha, gamma=s.gamma, K=s.K, layers=s.layers,
                           queries=s.queries)
        if rectify or s.apg is not None:
            self._release = weakref.finalize(self, _wrap_forward(denoiser, rectify, self._seen))

    def cleanup_models(self, denoiser):
        self._release()

    def __call__(self, data):
        return self.forward(**{getattr(batch, self._identifier_key): batch.noise_pred for batch in data})

    def forward(self, pred_cond, pred_uncond=None):
        pred, s = pred_cond, self.settings
        if pred_uncond is not None:
            wide = torch.promote_types(pred_cond.dtype, torch.float32)  # eq. 10 is coarse in half
            p, n = pred_cond.to(wide), pred_uncond.to(wide)
            pred = (erg.guide(p, n, s.w) if s.apg is None else self.project(p, n)).to(pred_cond.dtype)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    def project(self, p, n):
        """APG on predictions of the data, x - sigma * (noise - data)."""
        x, sigma = self._seen.pop("latents", None), 1 - self.t
        if isinstance(x, torch.Tensor):
            x = x[:, :p.shape[1]].to(p)  # pipelines append image conditions in dimension 1
        if getattr(x, "shape", None) != p.shape or sigma <= 0:
            raise ValueError(f"apg={self.config.apg} needs a transformer that predicts the flow at t < 1, "
                             f"from an argument `hidden_states` of shape {tuple(p.shape)}")
        s, x_pos, x_neg = self.settings, x - sigma * p, x - sigma * n
        x1, self._running = s.apg.update(x_pos, x_neg, s.w, self._running)
        return (x - x1) / sigma


@contextlib.contextmanager
def weak_negative(encoders, tau):
    """Context in which pipe(prompt=p, negative_prompt=p) takes the weak encoding of p as negative (C-ERG).

    encoders: {text encoder: its layers, None for all}, without those that the pipeline lacks. A forward on
    tokens that the encoder has met before is rectified. So it works in all pipelines that encode prompt and
    negative prompt by a forward each.
    """
    once = {encoder: set() for encoder in encoders}  # tokens met an odd number of times

    def again(encoder, *args, **kwargs):
        tokens = str(next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)).tolist())
        once[encoder] ^= {tokens}
        return tokens not in once[encoder]

    with contextlib.ExitStack() as stack:
        for encoder, layers in encoders.items():
            when = functools.partial(again, encoder)
            stack.enter_context(erg.rectify(encoder, tau=tau, layers=layers, when=when))
        yield
    for encoder, left in once.items():
        if left:
            raise RuntimeError(f"{type(encoder).__name__} did not encode each prompt twice, the second time "
                               "weakly: give the pipeline negative_prompt equal to prompt")
