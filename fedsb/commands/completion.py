"""``fedsb completion``: what makes a shell ask :mod:`fedsb.commands.completing` at each tab."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedsb.commands.completing import SHELLS, candidates
from fedsb.commands.flags import without_flags
from fedsb.core.errors import UserError, unknown

ASKED = "__complete"  # in place of a command: print what the last of the words behind it may become

# Where nothing is offered, each shell offers files, also behind a ``=``. A word that goes on (behind = . /) gets no space.
BASH = """# bash completion of fedsb: fedsb completion bash
_fedsb() {
    local line=${COMP_LINE:0:COMP_POINT} word
    local -a words
    read -ra words <<< "$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    word=${words[${#words[@]}-1]}
    mapfile -t COMPREPLY < <("${1/#\\~/$HOME}" __complete "${words[@]:1}" 2>/dev/null)
    [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *[=./] ]] && compopt -o nospace 2>/dev/null
    # readline takes = and : for ends of words, and asks for what stands behind the last one alone
    if [[ $word == *[=:]* && $COMP_WORDBREAKS == *=* ]]; then
        word=${word%"${word##*[=:]}"}
        COMPREPLY=("${COMPREPLY[@]#"$word"}")
    fi
}
complete -o bashdefault -o default -F _fedsb fedsb
"""

ZSH = """#compdef fedsb
# zsh completion of fedsb: fedsb completion zsh
_fedsb() {
    local -a found open whole
    found=("${(@f)$("${~words[1]}" __complete "${(@)words[2,CURRENT-1]}" "${(Q)PREFIX}" 2>/dev/null)}")
    found=(${found:#})
    open=(${(M)found:#*[=./]})
    whole=(${found:#*[=./]})
    (( $#open )) && compadd -S '' -a open
    (( $#whole )) && compadd -a whole
    (( $#found )) && return
    compset -P '*='
    _files
}
if [[ $funcstack[1] == _fedsb ]]; then _fedsb "$@"; else compdef _fedsb fedsb; fi
"""

FISH = """# fish completion of fedsb: fedsb completion fish
function __fedsb_complete
    set -l before (commandline -opc)
    set -l word (commandline -ct)
    set -l program $before[1]
    set -e before[1]
    set -l found ($program __complete $before "$word" 2>/dev/null)
    if set -q found[1]
        printf '%s\\n' $found
    else
        set -l key (string match -r '^[^=]*=' -- $word)
        for path in (__fish_complete_path (string replace -r '^[^=]*=' '' -- $word))
            echo "$key$path"
        end
    end
end
complete -c fedsb -f -a '(__fedsb_complete)'
"""

SCRIPTS: Mapping[str, str] = dict(zip(SHELLS, (BASH, ZSH, FISH), strict=True))


def completion(arguments: Sequence[str]) -> int:
    """Print the script of a shell.

    Raises:
        UserError: no shell is named, or one that is not known.
    """
    given = without_flags("completion", arguments)
    if len(given) != 1:
        raise UserError(f"fedsb completion takes one shell: {', '.join(SHELLS)}; see fedsb completion --help")
    if given[0] not in SCRIPTS:
        raise unknown("shell", given[0], SHELLS)
    print(SCRIPTS[given[0]], end="")
    return 0


def answer(words: Sequence[str]) -> int:
    """Print what a shell has asked for, one word a line."""
    for each in candidates(words):
        print(each)
    return 0
