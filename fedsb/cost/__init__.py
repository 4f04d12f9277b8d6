"""What a run would move over the wire, foretold before it runs."""
