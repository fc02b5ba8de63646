"""One run and its folder: may it go on, its rows, its time ledger, what it says."""
