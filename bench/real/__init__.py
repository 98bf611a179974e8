"""The run on real pictures: frozen towers over openclipart, adapters on their embeddings, and the cross-weight study.

    make real          a seed of every setting, on both data sets; at most 25 minutes on two cores
    make real-study    all seeds, what decides the sign of the calibration, and what uncertainty chooses

`fetch` gets and checks the pictures and weights, `openclipart` reads titles and keywords, `towers` encodes, `parts`
keeps the embeddings, `study` trains, `measures` and `results` judge, `figures` and `report` tell. `selection` chooses
captions, pictures and models in `targets`, `selection_report` tells. Needs
`pip install -e .[real]` and, once, a network.
"""
