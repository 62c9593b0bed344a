"""Pages, figures, tables and model cards, drawn from results."""
