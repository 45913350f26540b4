"""What privacy was spent: the accountant, the ledger, the budget."""
