"""Numbers from papers, each with source and protocol, for `evalbench.published`. None of them was measured here."""
