"""What commands need: their own place, the call, a federation that is soon over."""

from __future__ import annotations

from tests.commands.conftest import _own_place as _own_place
from tests.commands.conftest import call as call
from tests.commands.conftest import quick as quick
