"""What a worker of a sweep finds imported: the process that it is forked from imports this, once."""

from fedsb.core.collector import uncollected

with uncollected(for_good=True):
    import fedsb.app.answers
    import fedsb.commands.sweep
    import fedsb.runtime.grids
    import fedsb.server_app  # noqa: F401
