"A map-style data set of any form of sample, for the tests of `samples`."

from torch.utils.data import Dataset


class Rows(Dataset):
    "Any form of sample, by a function of position"

    def __init__(self, make, n, **attributes):
        self.make, self.n = make, n
        vars(self).update(attributes)

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self.make(i)
