// How each expert looks. A name decides its colour, so that it is the same in every answer; where another expert on
// this page has the colour already, the next free one is taken. After eight, colours come again with another line.

const COLOURS = 8;
const LOOKS = 3 * COLOURS;
const taken = new Map(); // look -> the expert that has it
const looks = new Map(); // expert -> its look

// Gives an element the colours of an expert; the style sheet has them by these numbers.
export function dress(element, expert) {
  const look = lookOf(expert);
  element.dataset.colour = look % COLOURS;
  element.dataset.line = Math.floor(look / COLOURS);
}

function lookOf(expert) {
  if (!looks.has(expert)) {
    const look = freeLook(hash(expert));
    looks.set(expert, look);
    taken.set(look, expert);
  }
  return looks.get(expert);
}

function freeLook(start) {
  for (let step = 0; step < LOOKS; step++) {
    const look = Math.floor(step / COLOURS) * COLOURS + ((start + step) % COLOURS);
    if (!taken.has(look)) return look;
  }
  return start % LOOKS; // more experts than looks: the tip tells them apart
}

// Experts that are only numbered get colours in their order.
function hash(expert) {
  if (/^\d{1,9}$/.test(expert)) return Number(expert);
  let sum = 0;
  for (const character of expert) sum = (31 * sum + character.codePointAt(0)) >>> 0;
  return sum;
}
