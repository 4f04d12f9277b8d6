"""What a conversation is written as: the text around its turns, and which of its characters are learnt.

The text is the one of the tokenizer's own chat template where it has one; of ``data.template`` where that is given; else of
:data:`fedsb.data.templates.PLAIN`. What a template puts around turns does not depend on what they say, so that it is found once for each
order of roles, by a conversation of stand-ins, and each text is then held against what the chat template itself makes of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from fedsb.config.schema import DataConfig
from fedsb.core.errors import UserError
from fedsb.data.cells import shown
from fedsb.data.instructions import Turn, turns_of
from fedsb.data.templates import PLAIN, forms_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
RESPONDS = "assistant"
MOST_NAMED = 12  # turns of which an error names the roles
# What a template takes today for: whoever goes on with a run on another day must read the same tokens. It is the day that Llama 3's
# template names where it is told none.
TODAY = datetime(2024, 7, 26)
WRITTEN = "".join(f"|replace('%{code}', '{TODAY.strftime('%' + code)}')" for code in "dbBYymAaHMSIpj")
FIXED_DAY = f"{{% macro strftime_now(format) %}}{{{{ format{WRITTEN} }}}}{{% endmacro %}}"
OPEN, CLOSE = "\ue000", "\ue001"  # around the number of a stand-in: for private use, so that no template writes them


@dataclass(frozen=True)
class Written:
    """A conversation as a text.

    Attributes:
        text: the whole of it.
        learnt: characters that are learnt, from and to.
        contents: characters that stand in the row and not in the template.
        whole: whether the text has its own special tokens, so that none are put around it.
        ends: whether the end-of-text token is to follow.
    """

    text: str
    learnt: tuple[Span, ...]
    contents: tuple[Span, ...]
    whole: bool = False
    ends: bool = False


@dataclass(frozen=True)
class Frame:
    """What stands around the turns of a conversation.

    Attributes:
        pieces: what stands before, between and behind them; one more than there are turns.
        learnt: by the number of a turn that is learnt, how many characters before it and behind it are learnt too.
        whole: see :class:`Written`.
        ends: see :class:`Written`.
    """

    pieces: tuple[str, ...]
    learnt: Mapping[int, Span]
    whole: bool = False
    ends: bool = False

    def around(self, contents: Sequence[str]) -> Written:
        """Write the frame around contents. Spaces before a response belong to it: most tokenizers join them to its first word."""
        text = self.pieces[0]
        inside: list[Span] = []
        learnt: list[Span] = []
        for content, piece in zip(contents, self.pieces[1:], strict=True):
            inside.append((len(text), len(text) + len(content)))
            text += content + piece
        for number, (before, behind) in self.learnt.items():
            start, end = inside[number][0] - before, inside[number][1] + behind
            least = learnt[-1][1] if learnt else 0
            while start > least and text[start - 1] == " ":
                start -= 1
            learnt.append((start, end))
        return Written(text, tuple(learnt), tuple(inside), self.whole, self.ends)


Writer = Callable[[str], Written]


def writer_of(cfg: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Writer:
    """Return what writes a row (:func:`fedsb.data.instructions.row_text`) as a text; one that says nothing is an empty text."""
    chat = cfg.template is None and has_template(tokenizer)
    write = _template_writer(cfg) if cfg.template is not None else _chat_writer(tokenizer) if chat else _plain(tokenizer)

    def written(row: str) -> Written:
        turns = turns_of(cfg, row)
        # Whether special tokens are put around it is the writer's to say: no row may do so for those beside it.
        return write(turns) if turns else Written("", (), (), whole=chat)

    return written


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def special_texts(tokenizer: PreTrainedTokenizerBase) -> Mapping[str, int]:
    """Return the special tokens as they are written, with their ids."""
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {**dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)), **added}


def _template_writer(cfg: DataConfig) -> Callable[[Sequence[Turn]], Written]:
    forms = {form.columns: form for form in forms_of(str(cfg.template))}

    def write(turns: Sequence[Turn]) -> Written:
        form, last = forms[tuple(turn.role for turn in turns)], len(turns) - 1
        frame = Frame(form.pieces, {last: (0, len(form.pieces[-1]))}, ends=True)
        return frame.around([turn.content for turn in turns])

    return write


def _plain(tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[Turn]], Written]:
    """Return what writes a turn a line. The end-of-text token ends what an assistant says; the last one is put there with the tokens."""
    end = tokenizer.eos_token or ""

    def write(turns: Sequence[Turn]) -> Written:
        # What follows each turn: behind the last one nothing but, with the tokens, its end.
        behind = [(end if turn.role == RESPONDS else "") + "\n" for turn in turns[:-1]]
        pieces = [before + PLAIN[turn.role] for before, turn in zip(["", *behind], turns, strict=True)]
        learnt = {i: (0, len([*behind, ""][i]) - bool(end and i < len(behind))) for i, turn in enumerate(turns) if turn.role == RESPONDS}
        return Frame((*pieces, ""), learnt, ends=turns[-1].role == RESPONDS).around([turn.content for turn in turns])

    return write


def _chat_writer(tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[Turn]], Written]:
    frames: dict[tuple[str, ...], Frame] = {}

    def write(turns: Sequence[Turn]) -> Written:
        roles = tuple(turn.role for turn in turns)
        if roles not in frames:
            frames[roles] = _frame_of(tokenizer, roles)
        contents = _found(frames[roles], [turn.content for turn in turns], _rendered(tokenizer, turns))
        if contents is None:
            raise _refusal(tokenizer, f"writes something else than what is said in the conversation that begins {shown(turns[0].content)}")
        return frames[roles].around(contents)

    return write


def _found(frame: Frame, contents: Sequence[str], text: str) -> list[str] | None:
    """Return contents as they stand in a text inside of a frame: with or without the blanks around them; None where they do not."""
    place, found = len(frame.pieces[0]) if text.startswith(frame.pieces[0]) else -1, []
    for content, piece in zip(contents, frame.pieces[1:], strict=True):
        ways = (content, content.strip(), content.lstrip(), content.rstrip())
        said = next((way for way in ways if place >= 0 and text.startswith(way + piece, place)), None)
        if said is None:
            return None
        found.append(said)
        place += len(said) + len(piece)
    return found if place == len(text) else None


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], **options: Any) -> str:
    try:
        template = tokenizer.get_chat_template()
        dated = {"chat_template": FIXED_DAY + template} if "strftime_now" in template else {}
        found = tokenizer.apply_chat_template([turn._asdict() for turn in turns], tokenize=False, **dated, **options)
    except Exception as error:  # a template raises what it likes
        said = " ".join(str(error).split())[:150] or type(error).__name__
        roles = ", ".join(turn.role for turn in turns[:MOST_NAMED]) or "nobody"
        raise _refusal(tokenizer, f"does not take turns of {roles} ({said})") from None
    return str(found)


def _refusal(tokenizer: PreTrainedTokenizerBase, what: str) -> UserError:
    name = tokenizer.name_or_path or "the tokenizer"
    return UserError(f"the chat template of {name} {what}; correct the rows, or write them by data.template='… {{question}} … {{answer}}'")


def _frame_of(tokenizer: PreTrainedTokenizerBase, roles: Sequence[str]) -> Frame:
    """Find what a chat template puts around turns of such roles, and where in it what an assistant says begins and ends.

    It begins where the template lets an answer begin (``add_generation_prompt``), and ends with the first special token behind it; in a
    template that has none there, with all that belongs to the turn.

    Raises:
        UserError: the template leaves a turn out, or writes a conversation otherwise than the beginning of a longer one.
    """
    turns = [Turn(role, f"{OPEN}{i}{CLOSE}") for i, role in enumerate(roles)]
    text = _rendered(tokenizer, turns)
    places = _places(text, [turn.content for turn in turns])
    if -1 in places or text.count(OPEN) != len(turns):
        raise _refusal(tokenizer, f"does not write each turn of {', '.join(roles[:MOST_NAMED])} once and in its order")
    ends = [place + len(turn.content) for place, turn in zip(places, turns, strict=True)]
    pieces = tuple(text[a:b] for a, b in zip([0, *ends], [*places, len(text)], strict=True))
    # An answer between the same two pieces begins and ends as the one before did: a long chat has few kinds of them, and is not rendered
    # once a turn.
    known: dict[tuple[str, str, bool], tuple[Span, bool]] = {}
    learnt, marked = {}, True
    for i in (i for i, role in enumerate(roles) if role == RESPONDS):
        kind = pieces[i], pieces[i + 1], i == len(roles) - 1
        if kind not in known:
            known[kind] = _answer_in(tokenizer, turns, i, text, (places[i], ends[i]))
        learnt[i], marked = known[kind]
    return Frame(pieces, learnt, whole=True, ends=roles[-1] == RESPONDS and not marked)


def _places(text: str, contents: Sequence[str]) -> list[int]:
    """Return where contents stand in a text, each behind the one before; -1 from the first one that does not."""
    places, start = [], 0
    for content in contents:
        place = text.find(content, start) if start >= 0 else -1
        start = place + len(content) if place >= 0 else -1
        places.append(place)
    return places


def _answer_in(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], i: int, text: str, said_at: Span) -> tuple[Span, bool]:
    """Return how many characters before and behind an answer are learnt with it, and whether a special token ends it.

    Args:
        tokenizer: has the template.
        turns: of a whole conversation.
        i: the number of the answer.
        text: what the template makes of the conversation.
        said_at: where in it the answer's content stands.
    """
    asked, said = _rendered(tokenizer, turns[:i], add_generation_prompt=True), _rendered(tokenizer, turns[: i + 1])
    start, end = said_at
    if not text.startswith(asked) or len(asked) > start:
        raise _refusal(tokenizer, "lets an answer begin otherwise than it writes one down")
    same = next((k for k, (a, b) in enumerate(zip(text, said, strict=False)) if a != b), min(len(text), len(said)))
    marked_at = _first_special(tokenizer, text[end:same])
    if marked_at is None and same < len(said):
        raise _refusal(tokenizer, "ends an answer otherwise inside of a conversation than at its end")
    return (start - len(asked), same - end if marked_at is None else marked_at), marked_at is not None


def _first_special(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """Return where the first special token of a text ends."""
    names = sorted(special_texts(tokenizer), key=len, reverse=True)
    found = re.search("|".join(map(re.escape, names)), text) if names else None
    return found.end() if found else None
