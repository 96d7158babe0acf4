"""What a model is measured by: scores, intervals, readings of a question, reports."""
