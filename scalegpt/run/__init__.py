"""This room continues, measures and reports one run: resuming, metrics, time ledger, replay."""
