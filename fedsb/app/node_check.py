"""What a node would do, tried on its own machine before anything is connected: its file, data, ledger, models, and a run held to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedsb.app.assembly import model_of
from fedsb.app.client_data import num_examples, site_rows
from fedsb.app.private_run import plan_of, reason_of
from fedsb.config.compose import load
from fedsb.config.derived import client_names
from fedsb.config.schema import Config, ModelConfig
from fedsb.core.errors import UserError, nearest
from fedsb.core.folders import check_makeable, conf_dir, home
from fedsb.data import Examples, find_labels, read_path
from fedsb.models.content import content_hash
from fedsb.models.loading import place_of
from fedsb.node.cautions import cautions
from fedsb.node.file import leaves, read_file
from fedsb.node.own_part import own_labels, own_model, with_own
from fedsb.node.policy import admit, admit_noise
from fedsb.node.request import Request
from fedsb.node.settings import NodeConfig, OwnModel
from fedsb.privacy.account import LEDGERS
from fedsb.privacy.accounting import epsilon_of
from fedsb.privacy.entries import Entry
from fedsb.privacy.naming import name_of_data
from fedsb.privacy.plan import choose_delta
from fedsb.privacy.shelf import NodeLedger, Shelf
from fedsb.secure.signing import private_key, public_keys

BOUNDS = ("privacy.", "limits.", "secure.min_clients", "methods", "models", "evaluate")  # begin the keys of what bounds a run
WAYS = ("prompt", "response", "messages", "template", "choices")  # keys of instruction data


@dataclass(frozen=True)
class _Trial:
    """A node, and a run of which its data are read: as it asks, and with what is the node's own."""

    node: NodeConfig
    asked: Config
    config: Config


def checked(path: Path, overrides: Sequence[str]) -> Iterator[str]:
    """Yield a line on each thing that was tried.

    Args:
        path: of ``node.yaml``.
        overrides: of a run that is to be held against it; none to try the node alone, by a run that follows from what it says.

    Raises:
        UserError: the first thing that would not do.
    """
    node = read_file(path.expanduser().resolve(), hashed=False)
    yield f"node      {path}: client '{node.client}'"
    for folder, said in ((home(), f"FEDSB_HOME={home()}"), (node.cache_folder, f"cache.folder={node.cache_folder}")):
        check_makeable(folder, said)
    asked = load(overrides) if overrides else run_of(node)
    trial = _Trial(node, asked, with_own(asked, node))
    _hold_named(trial)
    labels = _labels(trial)
    count = None
    if node.data_path is None:
        yield "data      in a package: a run deals them out"
    else:
        rows, *apart = site_rows(trial.config, node.data_path, own_labels(labels, node))
        yield f"data      {node.data_path}: {_rows(rows, labels)}"
        count = num_examples(trial.config, node.client, node.data_path, own_labels(labels, node)) if overrides else len(rows)
        yield f"held out  {_held_out(node, apart, labels)}"
        yield f"ledger    {_ledger(node, len(rows) + sum(map(len, apart)))}"
    yield from _models(trial, labels)
    if node.models is None:
        yield f"model     any{_unnamed(trial, labels) if overrides else ''}"
    if node.secure.required or node.secure.key or node.secure.peers:
        yield f"secure    {_signing(node)}"
    yield from (f"caution   {line}" for line in cautions(node))
    yield f"answers   {_answered(node)}"
    admit(node, Request(asked, labels, reason_of(asked), count))
    if overrides:
        cost = _cost(trial, count) if count and asked.privacy.unit == "example" else ""
        yield f"this run  would be answered{cost}: {' '.join(overrides)}"


def run_of(node: NodeConfig) -> Config:
    """Return a small run that reads what a node names, or the usual columns where it names none, with its first model and method."""
    own = node.data
    told = [f"federation.names=['{node.client}']", "federation.num_clients=1", f"data={'files' if node.data_path else 'bbc_news'}"]
    told += [f"method={node.methods[0]}"] if node.methods else []
    if node.privacy.unit:
        told += [f"privacy={node.privacy.unit}", f"privacy.noise_multiplier={node.privacy.min_noise or 1.0}"]
        told += [] if node.privacy.max_grad_norm is None else [f"privacy.max_grad_norm={min(1.0, node.privacy.max_grad_norm)}"]
    told += ["train.local_steps=1", "train.batch_size=1"] if any(value is not None for _, value in leaves(node.limits)) else []
    if any(getattr(own, key) is not None for key in WAYS):
        keys = [key for key in (*WAYS, "system") if getattr(own, key) is not None]
        told += ["data.task=causal_lm", "data.label=null", *(f"data.{key}=x" for key in keys)]
    elif own.text is not None and own.label is None:
        told += ["data.task=causal_lm", "data.label=null"]
    if isinstance(own.text, tuple) and len(own.text) == 2:
        told += ["data.text=[x,y]"]
    asked = load(told)
    names = (node.client, *(f"{node.client} {i}" for i in range(1, node.secure.min_clients or 1)))  # enough for a sum
    asked = replace(asked, federation=replace(asked.federation, secure_sum=node.secure.required, secure_dropout=0.0, names=names))
    return replace(asked, model=_model_called(node.models[0].name)) if node.models else asked


def _signing(node: NodeConfig) -> str:
    """Read the files of keys, and say what they are for."""
    key, peers = node.secure.key, node.secure.peers
    if key:
        private_key(Path(key))
    others = [] if peers is None else sorted(public_keys(Path(peers)).keys() - {node.client})
    known = f"holds others to the keys of {', '.join(others[:8])}{' …' if len(others) > 8 else ''}" if peers else "takes any keys of others"
    return f"{f'signs with {key}' if key else 'signs nothing'}; {known}"


def _hold_named(trial: _Trial) -> None:
    """Hold that the run has the node's client."""
    names = client_names(trial.asked)
    if trial.node.client not in names:
        hint = nearest(trial.node.client, names)
        raise UserError(f"client={trial.node.client}: the run has no such client{hint}; it has {', '.join(names[:8])} (federation.names)")


def _labels(trial: _Trial) -> tuple[str, ...]:
    """Return the classes of the run: as the node or the run names them, else those that occur here."""
    said = trial.node.data.labels or trial.asked.data.labels
    if said is not None:
        return tuple(map(str, said))
    if trial.node.data_path is None or trial.config.data.task != "classification":
        return ()
    try:
        return find_labels(read_path(trial.node.data_path, trial.config.data), trial.config.data, part="site")
    except UserError as error:  # under privacy=example such a row would break nothing, but nobody has named the classes
        raise UserError(f"{error} (the classes are looked for here, as nobody has named them in data.labels)") from None


def _rows(rows: Examples, labels: tuple[str, ...]) -> str:
    """Say how many rows there are, and of how many nothing is learnt, which under privacy=example breaks nothing."""
    unused = sum(not text.strip() for text in rows.texts)
    classes = f" of {len(labels)} classes" if labels else ""
    return f"{len(rows):,} rows{classes}, {f'{unused:,} of which cannot' if unused else 'all of which can'} be used"


def _held_out(node: NodeConfig, apart: Sequence[Examples], labels: tuple[str, ...]) -> str:
    """Say on what is evaluated, where anything is."""
    if not node.evaluate:
        return "nothing is evaluated"
    if apart:
        return f"{node.data.test_path}: {_rows(apart[0], labels)}"
    return "as a run asks (data.client_test_fraction)" if node.data.test_fraction is None else f"{node.data.test_fraction:.0%} of the rows"


def _spent(node: NodeConfig) -> tuple[Entry, ...] | None:
    """Return the releases of the data until now; None where there is no ledger yet, and none is made."""
    folder, name = home() / LEDGERS, name_of_data(node.client, node.data_path, node.privacy.ledger)
    return NodeLedger(Shelf(folder), name).entries() if (folder / name.folder / "ledger.jsonl").is_file() else None


def _ledger(node: NodeConfig, count: int) -> str:
    spent = _spent(node)
    if spent is None:
        return f"none in {home() / LEDGERS} yet"
    delta = min(choose_delta(None, count, f"'{node.client}'"), node.privacy.max_delta or 1.0)
    of = "" if node.privacy.max_epsilon is None else f" of {node.privacy.max_epsilon:g}"
    return f"epsilon {epsilon_of(spent, delta):.3f}{of} spent at delta {delta:g}"


def _cost(trial: _Trial, count: int) -> str:
    """Say what a run would be charged, once it has been held against the budgets and the least noise that the operator allows."""
    plan, accountant = plan_of(trial.asked, trial.node.client, count), trial.asked.privacy.accountant
    admit_noise(trial.node, *plan.multipliers)
    for limit in trial.node.budgets(plan.delta):
        found = epsilon_of((*(() if limit.of_run else _spent(trial.node) or ()), *plan.ceiling), limit.delta, accountant)
        if found > limit.epsilon:
            raise UserError(f"{limit.key}={limit.epsilon:g} would be exceeded: epsilon {found:.3f} at delta {limit.delta:g} after this run")
    cost, each = epsilon_of(plan.ceiling, plan.delta, accountant), plan.training
    told = f", metrics {len(plan.evaluated)} times with noise {plan.evaluation.noise_multiplier:.3f}" if plan.evaluation else ""
    return f" at epsilon {cost:.3f} and delta {plan.delta:g}, {each.steps} steps a round with noise {each.noise_multiplier:.3f}{told}"


def _models(trial: _Trial, labels: tuple[str, ...]) -> Iterator[str]:
    """Hash and load each model that the node names."""
    wrong = []
    for own in trial.node.models or ():
        asked = trial.asked.model if trial.asked.model.name == own.name else _model_called(own.name)
        model = own_model(asked, trial.node)
        if not Path(place_of(model)).exists():
            raise UserError(f"models: '{own.name}' is no folder of this machine; add its path")
        found = content_hash(Path(place_of(model)), trial.node.cache_folder)
        if found == own.sha256:
            yield f"model     {own.name}: sha256 {found}, {_loaded(trial, model, labels)}"
        else:
            yield f"model     {own.name}: sha256 {found}, which is {'not in the file yet' if own.sha256 is None else 'another one'}"
            wrong.append(f"'{own.name}' is {found}, and {'none is given' if own.sha256 is None else f'{own.sha256} is given'}")
    if wrong:
        raise UserError(f"models: the sha256 of {'; of '.join(wrong)}; write it into the file if that is the model you mean")


def _unnamed(trial: _Trial, labels: tuple[str, ...]) -> str:
    """Say what the model of a run holds that no bound of the node's names."""
    model = trial.config.model
    place = None if model.kind == "config" else Path(place_of(model))
    known = f"sha256 {content_hash(place, trial.node.cache_folder)}, " if place is not None and place.exists() else ""
    return f"; {model.name}: {known}{_loaded(trial, model, labels)}"


def _model_called(name: str) -> ModelConfig:
    """Return the model of ``conf/model`` that has a name; one out of a folder where none has."""
    for path in sorted((conf_dir() / "model").glob("*.yaml")):
        if path.stem != "pretrained" and (found := load([f"model={path.stem}"]).model).name == name:
            return found
    return load(["model=pretrained", f"model.name='{name}'"]).model


def _loaded(trial: _Trial, model: ModelConfig, labels: tuple[str, ...]) -> str:
    adapted = model_of(replace(trial.config, model=model), labels or ("a", "b"))
    size = sum(parameter.numel() for parameter in adapted.model.parameters())
    return f"{size / 1e6:,.1f} million parameters on {adapted.device}"


def _answered(node: NodeConfig) -> str:
    """Say what bounds a run, by the keys of the file."""
    plain = dict(leaves(NodeConfig(node.client, node.data)))
    bounds = [(key, value) for key, value in leaves(node) if key.startswith(BOUNDS) and value != plain[key]]
    said = [f"{key}={', '.join(map(_shown, value)) if isinstance(value, tuple) else value}" for key, value in bounds]
    return "; ".join(said) if said else "any run: the file sets no bounds"


def _shown(each: object) -> str:
    return each.name if isinstance(each, OwnModel) else str(each)
