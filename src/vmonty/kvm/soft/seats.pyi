class Seats:
    contended: bool

class Seat:
    running: bool
    online: bool
    pool: Seats
    def __init__(self, pool: Seats) -> None: ...
    def claim(self) -> bool: ...
