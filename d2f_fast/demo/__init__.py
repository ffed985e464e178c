"""Compare Diff2Flow with naive flow matching and with diffusion finetuning on the embedded miniature (`d2f demo`).

`run` does the whole demonstration, and `kept_parts` lets it go on after a stop. `settings` holds its sizes, `networks`
the finetuned networks and their training, `samplers` the samplers, `generation` turns captions into images,
`evaluation_set` and `measurements` measure, `rows` lists what a row of `metrics.json` holds, `comparisons` compares
rows, `summary` puts them into words, and `report` and `plots` write the page.
"""
