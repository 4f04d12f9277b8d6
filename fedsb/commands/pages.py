"""The help of the command line: a page for all of it, and one a command."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import fill

from fedsb.core.folders import conf_dir

WIDE = 140  # characters of a line

USAGE = """usage: fedsb COMMAND …

  fedsb run [key=value …] [-m] [--cfg job]   run a federation in this process (Hydra overrides; -m sweeps)
  fedsb submit [FEDERATION] [key=value …]    run a real federation, through a SuperLink of Flower's configuration
  fedsb cost [key=value …]                   parameters and bytes of every method for a model, without its weights
  fedsb watch FOLDER [--html]                how a run or a sweep stands, from its records alone, until it is over
  fedsb report FOLDER [FOLDER …]             write report and page of a run, or a comparison of several
  fedsb eval FOLDER [--max-examples N]       measure a run's model, or an exported one, beside its untouched base
  fedsb export FOLDER [OUT] [--format F]     write the model of a finished run, merged or as an adapter
  fedsb node check FILE [key=value …]        try what the operator of a node has said, before anything is connected
  fedsb worker --node FILE [--supervise]     answer for a node in one process, which alone can read its data and ledger
  fedsb federation init|server|node|… PATH   both sides of a federation over TLS: certificates, keys, SuperLink, nodes
  fedsb doctor                               what of this machine would make a run fail, and how to mend it
  fedsb completion bash|zsh|fish             what makes a shell complete commands, flags, groups, keys and folders of runs

  fedsb run experiment=quick                                      a first look: a minute
  fedsb run -m method=fedavg_lora,fed_sb seed=0,1 output=sweep    a sweep
  fedsb report sweep                                              its comparison
  fedsb cost model=mistral_7b federation.num_clients=25 rank=32   what methods would move

fedsb COMMAND --help says more, with examples; fedsb --version says which one this is.
Exit status: 0 done, 1 it failed, 2 a mistake in what was given, 130 Ctrl-C, 143 SIGTERM, 141 nobody reads the output any more."""

OVERRIDES = """KEY=VALUE sets any key of the configuration, GROUP=OPTION chooses a file of it; conf/ has them all, with a comment each.
A value with a comma, bracket or quote of its own is quoted twice: "data.path='/data/a,b.csv'"."""

PAGES: Mapping[str, str] = {
    "run": f"""usage: fedsb run [KEY=VALUE …] [GROUP=OPTION …] [-m] [--cfg job]

Run a federation in this process, and leave its records, checkpoints, adapter and report in a folder.

  fedsb run experiment=quick                                   a first look: a minute
  fedsb run method=fedex_lora rank=8 federation.num_rounds=5   another method
  fedsb run data=files data.path=my.csv data.text=review data.label=stars
  fedsb run -m method=fedavg_lora,fed_sb seed=0,1              a sweep: one run for each combination
  fedsb run resume=outputs/…                                   go on with a run that was ended
  fedsb run -m resume=multirun/…                               go on with what is left of a sweep
  fedsb run -m sweep=rates method=fed_sb,fedavg_lora sweep.jobs=auto

{OVERRIDES}

  output=FOLDER     where to write; by default outputs/DATE/TIME (a sweep: multirun/DATE/TIME)
  -m, --multirun    take values that commas set apart for a sweep; resume=FOLDER goes on with what is left of one
  sweep.jobs=N      of a sweep, so many jobs side by side; auto: as many as CPUs, GPUs and memory allow
  sweep.address=A   of a sweep, the Ray cluster whose machines take its jobs: HOST:PORT, with sweep.jobs=auto
  sweep.samples=N   of a sweep, so many points drawn from keys given as interval(a,b), tag(log,interval(a,b)) or shuffle(a,b,…)
  -c, --cfg job     show the configuration, or with -m that of each job, and run nothing; hydra or all: that of Hydra
  -p, --package KEY with --cfg, without -m: what stands below KEY, as in -p train
  --resolve         with --cfg, without -m: values in place of references to other keys
  -i, --info        what the configuration is composed from, and run nothing: all (the default), config, defaults, defaults-tree,
                    plugins, searchpath
  --hydra-help      Hydra's own help, which tells of flags that mean nothing here

Exit status: 0 done, 1 the run failed, 2 a mistake in what was given, 130 Ctrl-C, 143 SIGTERM, 141 nobody reads the output any more.
After 1, 130, 141 and 143 the run goes on with resume=FOLDER.""",
    "submit": f"""usage: fedsb submit [FEDERATION] [KEY=VALUE …] [GROUP=OPTION …]

Submit a run to a SuperLink, show what it prints, and wait for its end: `flwr run` for whoever needs to know how it ended.
FEDERATION is a connection of Flower's configuration, $FLWR_HOME/config.toml (~/.flwr), or the folder of a server (fedsb federation);
without one, the default of that file is taken.

  fedsb submit my-federation data=files data.test_path=/data/server/test.jsonl federation.num_clients=2
  fedsb submit my-federation resume=runs/7302                  go on with a run that was ended

{OVERRIDES}

  output=FOLDER     where the SuperLink writes; by default runs/RUN in its FEDSB_HOME
Paths are those of the SuperLink's machine; relative ones begin where it was started. The overrides are checked before anything is sent.

Exit status: 0 the run was completed, 1 it failed, was stopped, or its ServerApp was killed (Flower takes some 90 s to notice that), 2 a
mistake in what was given, or no SuperLink there, 130 Ctrl-C, 143 SIGTERM, 141 nobody reads the output any more. After 130, 141 and 143
the run goes on; `flwr log RUN FEDERATION` shows it, `flwr stop RUN FEDERATION` ends it.""",
    "cost": f"""usage: fedsb cost [KEY=VALUE …] [GROUP=OPTION …]

Show what every method would train and move, for a model's configuration alone: nothing is run, and no weights are read.

  fedsb cost model=mistral_7b federation.num_clients=25 rank=32 cost.rank.fed_sb=200

{OVERRIDES}

  cost.rank.METHOD=N   the rank of one method, where the others take rank=…""",
    "watch": """usage: fedsb watch FOLDER [--html] [--every SECONDS] [--once]

Show how a run, or the runs of a sweep, stand: state, round, result, gap, epsilon, bytes, time, and when all will be over. It reads records
alone, holds no lock and writes nothing, so that it may be started and stopped at any time, also of a run on another machine's disk.
Elsewhere than on a terminal it prints a line for each change. It ends when all is over, or at Ctrl-C.

  fedsb watch outputs/2026-11-22/10-00-00
  fedsb watch multirun/2026-11-22/10-00-00 --html
  fedsb watch sweep --once

  --html           keep the page in FOLDER fresh, at most every 15 seconds: that of fedsb report, of what there is so far
  --every SECONDS  between two looks; by default 2
  --once           show how it stands now, and end""",
    "report": """usage: fedsb report FOLDER [FOLDER …] [--against METHOD] [--metric NAME] [--target VALUE] [--tuned TEXT] [--out FOLDER]

Write report.md, plots and a page, report.html, that needs no network, into the folder of a run, finished or not. Several runs, or the
folder of a sweep, are compared: comparison.md, .csv, plots and comparison.html, into the folder above the first run. Runs that differ in
their seed alone are taken together as a method; those over different data are shown apart, and what is damaged is left out, with a warning.

  fedsb report outputs/2026-11-22/10-00-00
  fedsb report multirun/2026-11-22/10-00-00
  fedsb report multirun/2026-11-22/* --against fed_sb --target 0.9 --tuned 'of 4 rates by docs/grid.md'

  --against METHOD  what others are held against, seed by seed and test item by test item: a method, or a name out of the first column
                    of a table; by default fedavg_lora, or the first where that is not there
  --metric NAME     by which; by default the first of which more is better
  --target VALUE    of the metric, for bytes to equal quality; by default the worst of the methods' final means
  --tuned TEXT      how the learning rates were chosen; without it the comparison says that none is known to be tuned
  --out FOLDER      where the comparison goes""",
    "eval": """usage: fedsb eval FOLDER [KEY=VALUE …] [--max-examples N] [--tasks TASK,TASK] [--answers FILE]
       fedsb eval FOLDER --lm-eval tasks=NAME,NAME

Measure the model of a run, finished or not, on the server's test part, and its untouched base beside it: each figure with its interval
at 95%, and their difference. FOLDER may also be that of an exported model; where it does not lie in its run's folder it has to be told
its data, and has no base beside it.

  fedsb eval outputs/2026-11-22/10-00-00 --max-examples 50
  fedsb eval outputs/2026-11-22/10-00-00 --tasks exact_match eval.scorer=last_number eval.max_new_tokens=64
  fedsb eval my-model data=files data.path=qa.jsonl data.task=causal_lm data.prompt=question data.response=answer

  KEY=VALUE         what is to be otherwise than in the run: eval.*, data.*, train.eval_*, device, model.name where the model has moved
  --max-examples N  of the test part as many, drawn by the run's seed; short for eval.max_examples=N
  --tasks TASK,…    of loss, exact_match, choice; by default the loss and what the run was scored by, else what the data allow
  --answers FILE    leave each prompt with its reference and both answers there, as JSON lines
  --lm-eval         let lm-eval score the merged model (pip install 'lm-eval[hf]'): 'tasks=arc_easy,mine.yaml;limit=100;num_fewshot=5'""",
    "export": """usage: fedsb export FOLDER [OUT] [--format FORMAT] [--dtype DTYPE]

Write the model of a finished run, its tokenizer and a model card; into FOLDER/FORMAT, or into OUT, which must be empty.

  fedsb export outputs/2026-11-22/10-00-00 my-model
  fedsb export outputs/2026-11-22/10-00-00 my-adapter --format peft

  --format  merged      plain weights in shards, for transformers and vLLM (the default)
            peft        an adapter for PeftModel.from_pretrained: what the base lacks, whatever the method
            gguf-ready  merged, as llama.cpp's convert_hf_to_gguf.py reads it; language models
  --dtype   of merged weights: float32, bfloat16, float16 (fp32, bf16, fp16); by default that of the base""",
    "node": """usage: fedsb node check FILE [KEY=VALUE …] [GROUP=OPTION …]

Try what the operator of a node has said in FILE, a node.yaml (docs/node.yaml has every key), before anything is connected: read and count
its data, hash and load its models, and print what would be answered. Nothing is sent, and nothing is charged to the ledger.

  fedsb node check /etc/fedsb/node.yaml
  fedsb node check /etc/fedsb/node.yaml method=fed_sb privacy=example privacy.epsilon=3 data=files federation.num_clients=2

With overrides the run that they make is held against it; without, one that follows from the file is tried. A model whose sha256 is not in
the file yet, or is another one, is told with the one that it has.

Exit status: 0 all is well, 2 something would not do: one line says what.""",
    "worker": """usage: fedsb worker --node FILE [--at FOLDER] [--group NAME] [--supervise]

Answer for a node in one process that keeps its model, tokens, frozen parts and accounts, and that alone need be able to read its data and
ledger. The SuperNode is told where it is, and what it starts for a message then hands bytes on:

  fedsb worker --node /etc/fedsb/node.yaml --at /run/fedsb/ward-7 --group flower --supervise
  flower-supernode … --node-config 'worker="/run/fedsb/ward-7" worker-user="fedsb"'

  --node FILE     a node.yaml; docs/node.yaml has every key
  --at FOLDER     of the socket and its token, this user's own; by default worker/ beside FILE
  --group NAME    whose members may talk to it: that of the SuperNode's user; by default this user alone
  --supervise     start it again where it dies, and end it where a message takes longer than limits.max_seconds

Exit status: 2 it could not begin: one line says why; 130 Ctrl-C, 143 SIGTERM.""",
    "federation": """usage: fedsb federation init FOLDER [--host NAME,ADDRESS,…]
       fedsb federation server FOLDER [--host ADDRESS] [--port PORT]
       fedsb federation node-key FILE
       fedsb federation node FOLDER --link HOST:PORT [--worker FOLDER [--worker-user NAME]]
       fedsb federation status|stop FOLDER

Both sides of a federation over TLS, each from a folder of its own.

On the server's machine:
  init       ca.crt, ca.key and link.key where they are not there yet, link.crt anew; --host: names and addresses under which the
             SuperLink is reached, beside 127.0.0.1 and localhost. A SuperLink that runs takes a new certificate when it is started again
  server     a SuperLink that takes registered keys alone, until a signal comes; its state lies in link.db, outputs of runs in runs/.
             A node is admitted by its public key as nodes/CLIENT.pub, and may serve that client alone; without the file for ten seconds
             it is revoked, for good.
             --host 127.0.0.1, --port 18000: where it listens
  fedsb submit FOLDER KEY=VALUE …   runs on it

On a node's machine:
  node-key   the node's key, and with .pub behind it what the server's operator needs of it; call it FOLDER/key
  node       a SuperNode, and a worker of FOLDER/node.yaml beside it (or, with --worker, the one that runs there, as --worker-user),
             until a signal comes; FOLDER holds key and ca.crt

  status     what runs; on the server's machine nodes and runs too
  stop       end it

  fedsb federation init /srv/fed --host federation.example.org
  fedsb federation server /srv/fed --port 18001
  fedsb federation node-key /etc/fedsb/key
  fedsb federation node /etc/fedsb --link federation.example.org:443
  fedsb federation status /srv/fed

The authority is made once (ten years); the SuperLink's certificate (825 days) anew each time, of the same key. No key is overwritten.
Exit status: 1 the SuperLink does not answer, refuses the node, or ended; 2 a file is missing, or the authority is not the SuperLink's.""",
    "doctor": """usage: fedsb doctor [--output FOLDER] [--port PORT]

Try what a run needs of this machine, and print one line a check: what was found, and where it would fail how to mend it. Versions and
packages, GPU, memory, shared memory (Ray's), folders and disk, the hub's offline variables, a SuperLink's port, and a run of seconds.

  fedsb doctor
  fedsb doctor --output /data/runs --port 18001

  --output FOLDER   that runs are to be written below; by default outputs/ here
  --port PORT       that a SuperLink is to listen on; by default 18000. One that runs already holds it

Exit status: 0 all is well, 1 something would fail.""",
    "completion": """usage: fedsb completion bash|zsh|fish

Print what makes a shell complete commands, flags, GROUP=OPTION, keys of the configuration, folders of runs and federations.

  fedsb completion bash > ~/.local/share/bash-completion/completions/fedsb   (or: source <(fedsb completion bash), in ~/.bashrc)
  fedsb completion zsh > ~/.zfunc/_fedsb                                     (a folder of $fpath; or source it behind compinit, in ~/.zshrc)
  fedsb completion fish > ~/.config/fish/completions/fedsb.fish""",
}


def page(command: str) -> str:
    """Return the help of a command; that of one that takes overrides ends with the groups there are."""
    return PAGES[command] + (f"\n\n{_groups()}" if OVERRIDES in PAGES[command] else "")


def _groups() -> str:
    folders = sorted(path for path in conf_dir().iterdir() if path.is_dir() and list(path.glob("*.yaml")))
    return "\n".join(["Groups and their options:", *map(_options, folders)])


def _options(group: Path) -> str:
    names = ", ".join(sorted(path.stem for path in group.glob("*.yaml")))
    return fill(names, WIDE, initial_indent=f"  {group.name + '=':<14}", subsequent_indent=" " * 16)
