"""A tree that was composed before, with values put in, is what Hydra composes of all of it at once, or what it refuses."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedsb.config.explaining import groups
from fedsb.config.trees import composed
from fedsb.core.folders import ROOT_CONFIG, conf_dir

LINES = [
    (),
    ("method=flexlora", "rank=4", "method.options.energy=0.5"),
    ("experiment=quick", "method=fed_sb", "seed=3", "+data.more=[a,'b c',{d: 1}]", "++method.options.new=null"),
    ("rank=5", "experiment=gsm8k_small", "model=minilm", "train.lr=1e-3", "~train.schedule", "output='/a b/ü'"),
    ("federation.names=[x,y]", "federation.num_clients=${rank}", "++adapter.options={gamma:3}", "privacy=client", "rank=7"),
    ("method=fed_sb", "method=flora"),
    ("train.lr=0.1", "method=florist", "method.options.energy=0.5", "train={lr:0.2}", "method={options:{energy:0.9}}"),
    ("+train.x=1", "train={x:2}"),
    ("hydra/job_logging=none", "hydra/launcher=basic", "rank=3"),
    ("experiment=quick", "~runtime", "++rank=5"),
    ("runtime=ray", "hydra.job.name=other", "data=files", "data.path=x.csv", "federation.partition={kind:iid}"),
]
REFUSED = [
    ("rnak=3",), ("method=nothing",), ("+rank=3",), ("~nothing",), ("rank=1,2",), ("hydra.nothing=3",),
    ("~train.lr", "train={lr:0.2}"), ("hydra/launcher=nothing",), ("method.options=3", "method.options.a=4"), ("defaults=3",), ("rank=${",),
]  # fmt: skip


def by_hydra(overrides: tuple[str, ...]) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose(ROOT_CONFIG, overrides=list(overrides))


def here(overrides: tuple[str, ...]) -> DictConfig:
    return composed(conf_dir(), overrides, groups())


@pytest.mark.parametrize("overrides", LINES, ids=str)
def test_it_is_what_hydra_composes(overrides: tuple[str, ...]) -> None:
    wanted = by_hydra(overrides)
    for _ in range(2):
        found = here(overrides)
        assert found == wanted
        assert OmegaConf.to_yaml(found) == OmegaConf.to_yaml(wanted)
        assert OmegaConf.is_struct(found) == OmegaConf.is_struct(wanted)


@pytest.mark.parametrize("overrides", REFUSED, ids=str)
def test_what_hydra_refuses_is_refused_as_it_does(overrides: tuple[str, ...]) -> None:
    said = []
    for way in (by_hydra, here):
        with pytest.raises((HydraException, OmegaConfBaseException)) as caught:
            way(overrides)
        said.append((type(caught.value), str(caught.value)))
    assert said[0] == said[1]


def test_a_tree_bears_no_trace_of_the_values_put_into_it() -> None:
    first = here(("method=flora", "rank=3", "method.options={}"))
    assert here(("method=flora",)) == by_hydra(("method=flora",)) != first


def test_threads_that_compose_at_once_do_not_meet() -> None:
    lines = [(f"method={name}", "experiment=quick", "seed=9") for name in ("fed_sb", "flora", "ffa_lora", "rolora", "abba", "ravan")]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(here, lines))
    assert [tree.method.name for tree in found] == [line[0].partition("=")[2] for line in lines]
