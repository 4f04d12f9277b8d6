"""Where a run's factors start: at once on the server, or in a phase with the clients."""

from __future__ import annotations

from clients import dense_gradients, draw_evidence, give_evidence
from fedsb.adapters.starts import sign_start
from fedsb.app.assembly import public_features, task_of
from fedsb.app.own_factors import data_free
from fedsb.config.derived import start_kind
from fedsb.config.schema import Config
from fedsb.core.state import State
from fedsb.models.adapted import AdaptedModel
from fedsb.models.collating import collate
from fedsb.wire.arrays import quantise
from fedsb.wire.frozen import FrozenLog
from fedsb.wire.sketch_layouts import sketch_of
from strategies.base import Start
from strategies.gradient_start import GradientStart


def first_factors(config: Config, adapted: AdaptedModel, frozen: FrozenLog) -> tuple[State, Start | None]:
    """Return the first trained state and what is left to do with the clients; a basis known already goes to the log."""
    adapted.reset()
    spec, kind, init, rank = adapted.spec, start_kind(config), config.init, config.adapter.rank
    sent = dict(adapted.layouts.down.shapes)
    base = State({name: t for name, t in adapted.copied(*spec.in_state).items() if name in sent})
    if kind is None:
        return base, None
    if kind == "gradient" and init.evidence == "clients":
        sketch, noised = sketch_of(init, rank, config.seed), bool(config.privacy.init_fraction)
        return base, GradientStart(sketch, adapted.shapes, core_kind=init.core, step=init.step, noised=noised)
    if kind == "gradient":
        assert spec.from_gradient is not None
        factors = spec.from_gradient(public_start(config, adapted), init.core, init.step, adapted.scale)
    else:
        factors = data_free(config, adapted)
    # Taken out as clients hold it: what the wire rounds away would be missing from the weights that the run begins at.
    rounded = factors.merge(quantise(factors.pick(*spec.in_state), config.federation.wire_dtype))
    shift = spec.shift(rounded, adapted.scale) if kind in spec.shifting else State()
    frozen.append(factors.pick(*spec.in_log).merge(shift))
    return base.merge(factors.pick(*spec.in_state)), None


def public_start(config: Config, adapted: AdaptedModel) -> State:
    """Return B, A and the singular values of the gradient on the server's public text: the same sketch, with one party."""
    task, init = task_of(config), config.init
    examples = draw_evidence(public_features(config), init.num_examples, seed=config.seed, client="public")
    if init.update == "sign":
        chunks = [examples[i : i + init.micro_batch] for i in range(0, len(examples), init.micro_batch)]
        batches = [(batch, task.terms(batch)) for batch in (collate(chunk, adapted, task) for chunk in chunks)]
        gradients = dense_gradients(adapted.model, batches, lambda model, batch: task.loss(task.forward(model, batch), batch))
        return sign_start(gradients, config.adapter.rank, config.seed)
    sketch = sketch_of(init, config.adapter.rank, config.seed)
    probes = mean = State()
    for number, stage in enumerate(sketch.exchanges):
        probes = sketch.basis(mean) if number else State()
        mean = give_evidence(adapted, task, examples, sketch=sketch, stage=stage, probes=probes, micro_batch=init.micro_batch)
    return sketch.finish(mean, probes)
