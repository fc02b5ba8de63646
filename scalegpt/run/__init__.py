"""This package is about one run and its folder: resuming, metrics, time ledger, reports."""
