-- take: move deliveries from RQ queues, the first queue first, each into its queue's own intermediate list.
--
-- KEYS  1 RQ's suspension flag  then per queue: its list, its intermediate list
-- ARGV  1 how many at most
-- Returns {'suspended'}, or {'taken', queue number (1, 2, ...), RQ job id, queue number, RQ job id, ...}
-- Nothing is ever outside a list: RQ's own multi-queue worker pops with BLPOP and loses what it holds when it dies.
-- A full server refuses it: what waits goes on waiting, what runs can end.
-- A lost reply leaves deliveries in the intermediate lists; the sweep brings their jobs back.

if redis.call('EXISTS', KEYS[1]) == 1 then
  return {'suspended'}
end
local taken = {'taken'}
local left = tonumber(ARGV[1])
for queue = 1, (#KEYS - 1) / 2 do
  while left > 0 do
    local id = redis.call('LMOVE', KEYS[2 * queue], KEYS[2 * queue + 1], 'LEFT', 'RIGHT')
    if not id then
      break
    end
    taken[#taken + 1] = queue
    taken[#taken + 1] = id
    left = left - 1
  end
end
return taken
