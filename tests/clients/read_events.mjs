// eventsource-parser on live streams. Arguments: the file of its stream class, the URL, a JSON list of bodies.
// It gets the bytes one by one, as a network may cut them. Prints a JSON list of each stream's events.
import {pathToFileURL} from 'node:url'

const [module, url, bodies] = process.argv.slice(2)
const {EventSourceParserStream} = await import(pathToFileURL(module))

async function read(body) {
  const headers = {'Content-Type': 'application/json'}
  const answer = await fetch(url, {method: 'POST', headers, body: JSON.stringify(body)})
  const cut = new TransformStream({
    transform(chunk, controller) {
      for (const byte of chunk) controller.enqueue(new Uint8Array([byte]))
    },
  })
  const texts = answer.body.pipeThrough(cut).pipeThrough(new TextDecoderStream())
  const events = []
  for await (const {event, id, data} of texts.pipeThrough(new EventSourceParserStream())) {
    events.push({event: event ?? 'message', id: id ?? '', data})
  }
  return events
}

const all = []
for (const body of JSON.parse(bodies)) all.push(await read(body))
console.log(JSON.stringify(all))
