"""Aggregators against the plain gradient on real multi-task data: `python -m jaxjd.demo`.

The modules, from the data to the screen: `data` loads the data sets, `models` has the networks,
`train` the training steps and what is measured of them, `results` the numbers and what they say,
`figure` and `report` show them, `session` runs it all, and `cli` reads the options. A new
aggregator is a row of `train.AGGREGATORS`.
"""
