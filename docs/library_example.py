"""From a model to figures, as a notebook: each `# %%` is a cell in VS Code, PyCharm and Spyder; jupytext opens it in Jupyter.

It reads model/, store/ and volume.nii.gz in the working directory. After `bash launch/quickstart.sh`, that is quickstart/
with a volume copied there: cp phantom/COVID-19-CT-Seg_20cases/phantom_001.nii.gz volume.nii.gz
"""

# %% A volume, its mask, its millilitres
import nibabel as nib
import numpy as np
from matplotlib import pyplot as plt

import distseg

model = distseg.load("model")
result = model.segment("volume.nii.gz", probabilities=True)
result.save("mask.nii.gz")
print(result)

# %% Which slices are affected
lung, infection = (np.isin(result.mask, labels).sum(axis=(1, 2)) for labels in model.regions.values())
worst = int(infection.argmax())
print(f"slice {worst}: {lung[worst]} pixels of lung, {infection[worst]} of infection")

# %% A picture of the worst one, with the probability of infection
volume = nib.load("volume.nii.gz")
hu = nib.as_closest_canonical(volume).get_fdata()[::-1, ::-1].T  # slices, rows, columns, as a radiologist sees them
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 4), layout="constrained")
left.imshow(hu[worst], cmap="gray", vmin=-1250, vmax=250)
left.contour(result.mask[worst] == model.labels["infection"], levels=[0.5], colors="red")
right.imshow(result.probabilities["infection"][worst], cmap="magma", vmin=0, vmax=1)
figure.savefig("mask.png")

# %% Agreement with an annotation: a case of the store that the model was not trained on
store = distseg.open_store("store")
case = store.splits[0]["test"][0]
hu, truth = store.read_case(case)
mask = model.segment(hu, spacing_mm=case.spacing_mm).mask
for region, labels in model.regions.items():
    found, annotated = np.isin(mask, labels), np.isin(truth, labels)
    dice = 2 * (found & annotated).sum() / max(found.sum() + annotated.sum(), 1)
    print(f"{case.id}, {region}: Dice {dice:.3f}")

# %% How much of the training slices is infected
shares = [(labels == store.labels["infection"]).mean() for _, labels in store.read_slices("train", fold=0)]
print(f"{len(shares)} training slices, {100 * np.mean(shares):.1f} % of their pixels are infection")
