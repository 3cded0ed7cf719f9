"""Studies: methods compared over seeds and tasks with as many trained parameters each, and the page
that says what came out."""
