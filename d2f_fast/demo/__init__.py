"""Show on the embedded miniature what the package does (`d2f demo`).

`run` does the whole demonstration, and `kept_parts` lets it go on after a stop. `settings` holds its sizes, `networks`
the trained networks and their training, `samplers` the times of the base's own sampler, `generation` turns captions
into images, `evaluation_set` and `measurements` measure, `rows` lists what a row of `metrics.json` holds and compares
rows, `summary` puts them into words, and `report` and `plots` write the page.
"""
